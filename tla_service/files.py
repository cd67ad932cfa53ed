"""Files and folders that appear complete or not at all, even when the power fails; locks that name their holder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Self

from tla_service.errors import ConfigError, UnavailableError, without_credentials

LOCK_FILE = ".lock"
PART_SUFFIX = ".part"
_READ_SECONDS = 2.0
_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107  # sun_path, less the byte that ends it
_held: set[Path] = set()
_log = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expanded(setting: str, path: str | Path) -> Path:
    """A path with the home folder in place of `~`; UnavailableError, naming the setting, if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # an unknown user, or no HOME, as in some containers
        raise UnavailableError(setting, path, "no home folder", "give an absolute path") from error


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
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


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


def remove_parts(folder: Path, name: str = "") -> None:
    """Remove what killed processes left of a folder's files, or of one; only where no other process can be writing."""
    for part in folder.glob(f".{_mark(name)}*{PART_SUFFIX}"):
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
    return path.with_name(f".{_mark(path.name)}{uuid.uuid4().hex}{PART_SUFFIX}")


def _mark(name: str) -> str:
    # A digest: with the name itself, that of the part could be too long.
    return name and hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


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


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, since when (local time), and its command line without passwords."""

    host: str
    pid: int
    since: str
    command: str

    @classmethod
    def here(cls) -> Self:
        """This process, now."""
        command = without_credentials(" ".join(shlex.join(sys.orig_argv).split()))
        return cls(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z"), command)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}: {self.command}"


@contextlib.contextmanager
def locked_folder(folder: Path, setting: str) -> Iterator[None]:
    """Lock a folder against other processes, on other machines too if the file system supports it.

    The folder, named by `setting`, is created if missing; a ConfigError names the process that holds the lock. POSIX
    locks belong to a process: children do not inherit them, and they end with it.
    """
    path = folder.resolve() / LOCK_FILE
    if path in _held:
        # Opening and closing the file again would release the lock.
        raise in_use(setting, folder, Holder.here())
    with _acquired(path, folder, setting) as file:
        _held.add(path)
        try:
            file.truncate(0)
            file.write(json.dumps(asdict(Holder.here())))
            file.flush()
            yield
        finally:
            _held.discard(path)
            if _is_same(path, file):
                path.unlink()


def _acquired(path: Path, folder: Path, setting: str) -> IO[str]:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            reason = f"cannot be written ({(error.strerror or str(error)).lower()})"
            raise UnavailableError(setting, folder, reason, f"choose another --{setting}") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise in_use(setting, folder, _read_holder(path)) from None
        except OSError as error:
            _log.warning("%s: its file system has no locks (%s); use it from one process at a time", folder, error)
        if _is_same(path, file):
            return file
        file.close()  # removed by its last holder in the meantime


def _is_same(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still the one of that name: if the folder was deleted, another may be."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(path: Path) -> Holder | None:
    """The holder according to the file, which is written just after the lock is taken."""
    deadline = time.monotonic() + _READ_SECONDS
    while path.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Holder(**json.loads(path.read_text()))
        time.sleep(0.05)
    return None


def in_use(setting: str, folder: Path | str, holder: Holder | None) -> ConfigError:
    """The error for the second of two processes."""
    reason = f"in use by {holder or 'another process'}"
    return ConfigError(setting, folder, reason, f"wait for it, end it, or choose another --{setting}")
