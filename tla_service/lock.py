"""One process per folder: a lock that names its holder and is released by the system when the holder dies."""

import contextlib
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Self

from tla_service.errors import ConfigError, UnavailableError, without_credentials

LOCK_FILE = ".lock"
_READ_SECONDS = 2.0
_held: set[Path] = set()
_log = logging.getLogger(__name__)


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

    A POSIX lock belongs to the process: children do not inherit it, and it is released when the process ends. The
    folder, which `setting` names, is created if missing; a ConfigError names the process that holds the lock.
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
            path.unlink(missing_ok=True)


def _acquired(path: Path, folder: Path, setting: str) -> IO[str]:
    """The lock file, open and locked."""
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
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # removed by its last holder in the meantime


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
