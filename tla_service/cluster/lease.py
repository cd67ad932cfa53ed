"""One driver per folder of shared storage or S3, which have no file locks."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tla_service.cluster.folder import Folder
from tla_service.errors import UnavailableError, UserError
from tla_service.files import Holder, in_use

LEASE = "held_by.json"
BEAT_SECONDS = 5.0
RELEASE_SECONDS = 10.0  # at most, while the storage is unavailable
SILENT_SECONDS = 30.0  # a holder on another host counts as dead after this long without a heartbeat
_FIELDS = {"host", "pid", "since", "command", "machine", "began", "id"}


class Lease:
    """A held folder.

    Attributes:
        lost: Called, in a thread of its own, with the error when another driver has taken over the folder.
    """

    def __init__(self) -> None:
        self.lost: Callable[[UserError], None] = self._remember
        self._error: UserError | None = None

    def check(self) -> None:
        """Raise the error, unless `lost` was replaced."""
        if self._error is not None:
            raise self._error

    def _remember(self, error: UserError) -> None:
        self._error = error


@contextlib.contextmanager
def held(folder: Folder, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold a folder against drivers on any host.

    The holder rewrites a small file every few seconds. A driver on the same host looks for the process; a driver on
    another watches the file, by its own clock, until it changes or `SILENT_SECONDS` have passed.

    Args:
        folder: The folder.
        say: Shows a message if this has to wait.

    Raises:
        ConfigError: Another driver holds it.
        UnavailableError: It cannot be read or written.
    """
    mine = {**asdict(Holder.here()), **_process(os.getpid()), "id": uuid.uuid4().hex, "beat": 0}
    _wait_until_free(folder, say)
    _write(folder, mine)
    lease, over = Lease(), threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            # An outage of the storage does not end the run.
            with contextlib.suppress(UnavailableError):
                now = _read(folder)
                if now is not None and now["id"] != mine["id"]:
                    lease.lost(in_use("scaling.storage", folder.uri, _holder(now)))
                    return
                mine["beat"] += 1
                _write(folder, mine)
        with contextlib.suppress(UnavailableError):
            folder.delete(LEASE)

    thread = threading.Thread(target=beat, name="storage-lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        over.set()
        thread.join(RELEASE_SECONDS)


def _wait_until_free(folder: Folder, say: Callable[[str], None]) -> None:
    found = _read(folder)
    if found is None or not _may_live(found):
        return
    if found["machine"] != _process(os.getpid())["machine"]:
        say(f"{folder.uri} was held by {_holder(found)}; watching for up to {SILENT_SECONDS:.0f} s if it still is")
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_SECONDS / 2))
            now = _read(folder)
            if now is None:
                return
            if now != found:
                break
        else:
            return
    raise in_use("scaling.storage", folder.uri, _holder(found))


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        lease = dict(json.loads(folder.read(LEASE) or b"{}"))
    except ValueError:
        return None
    return lease if lease.keys() >= _FIELDS else None


def _write(folder: Folder, lease: dict[str, Any]) -> None:
    folder.write(LEASE, json.dumps(lease).encode())


def _process(pid: int) -> dict[str, Any]:
    """Identity of a process: host, boot, container and start time."""
    machine = socket.gethostname()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{machine} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return {"machine": machine, "began": psutil.Process(pid).create_time()}


def _may_live(lease: dict[str, Any]) -> bool:
    """Whether the holder may be alive; on another host, that is unknown."""
    if lease["machine"] != _process(os.getpid())["machine"]:
        return True
    try:
        process = psutil.Process(lease["pid"])
        is_same = abs(process.create_time() - lease["began"]) < 2
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _holder(lease: dict[str, Any]) -> Holder:
    return Holder(lease["host"], lease["pid"], lease["since"], lease["command"])
