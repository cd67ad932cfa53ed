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
    """Yield an empty, hidden file beside `path`, which is renamed to it after the block, or removed if that raises."""
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
    """As `whole_file`, for a folder, whose parents are made."""
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
    """Refuse a folder, named by an environment variable, below which `tail` would be too long a path for a socket."""
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
