"""Files and folders that appear complete or not at all, even when the process is killed or the power fails."""

import contextlib
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from tla_service.errors import UnavailableError

PART_SUFFIX = ".part"
_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107  # sun_path, less the byte that ends it


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name in its own folder; rename it, over an older one, when it is complete.

    Args:
        path: The file.

    Yields:
        An empty, hidden file to write to; removed when the block raises.
    """
    part = _part_of(path)
    part.touch(exist_ok=False)
    try:
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes; see `whole_file`."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name beside its place; rename it, over an older one, when it is complete.

    Args:
        path: The folder; its parents are made.

    Yields:
        An empty, hidden folder to fill; removed when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = _part_of(path), _part_of(path)
    part.mkdir()
    try:
        yield part
        for inside in (*part.rglob("*"), part):
            _sync(inside)
        # Aside in one move: a process killed while deleting must not leave half a folder under the name.
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
        part.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left in a folder; only where no other process can be writing."""
    for part in folder.glob(f".*{PART_SUFFIX}"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def check_socket_path(variable: str, folder: str, tail: str, whose: str, remedy: str) -> None:
    """Refuse a folder below which the path of a Unix socket would be too long.

    Args:
        variable: Environment variable that names the folder, for messages.
        folder: The folder.
        tail: Path of the socket below it, as long as it will be.
        whose: Whose sockets they are.
        remedy: What to set.

    Raises:
        UnavailableError: It would be.
    """
    length = len(os.fsencode(Path(folder, tail)))
    if length > _SOCKET_PATH_BYTES:
        reason = f"too long a path for {whose}: sockets below it have {length} bytes, at most {_SOCKET_PATH_BYTES} work"
        raise UnavailableError(variable, folder, reason, remedy)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}{PART_SUFFIX}")


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync this kind of file
            raise
    finally:
        os.close(descriptor)
