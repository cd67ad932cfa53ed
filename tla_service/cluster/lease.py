"""One driver per folder of shared storage or S3, which have no file locks."""

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tla_service.cluster.storage import Folder
from tla_service.errors import UnavailableError, UserError
from tla_service.files import Holder, in_use

LEASE = "held_by.json"
BEAT_SECONDS = 5.0
RELEASE_SECONDS = 10.0  # at most, while the storage is unavailable
SILENT_SECONDS = 30.0  # a holder on another host counts as dead after this long without a heartbeat
_HOLDER = ("host", "pid", "since", "command")
_FIELDS = {*_HOLDER, "machine", "began", "id"}


class Lease:
    """A held folder; `error` is set when another driver has taken it over."""

    error: UserError | None = None

    def check(self) -> None:
        """Raise the error, if there is one."""
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def held(folder: Folder, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold a folder against drivers on any host; `say` shows a message if this has to wait.

    The holder rewrites a small file every few seconds. A driver on the same host looks for the process; a driver on
    another watches the file, by its own clock, until it changes or `SILENT_SECONDS` have passed. If another driver
    holds the folder, raises ConfigError.
    """
    mine = {**asdict(Holder.here()), **_this_process(), "id": uuid.uuid4().hex, "beat": 0}
    _wait_until_free(folder, say)
    folder.write(LEASE, json.dumps(mine).encode())
    lease, over = Lease(), threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            # An outage of the storage does not end the run.
            with contextlib.suppress(UnavailableError):
                now = _read(folder)
                if now is not None and now["id"] != mine["id"]:
                    lease.error = _refusal(folder, now)
                    return
                mine["beat"] += 1
                folder.write(LEASE, json.dumps(mine).encode())
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
    if found is None:
        return
    if found["machine"] == _this_process()["machine"]:
        if _lives(found):
            raise _refusal(folder, found)
        return
    say(f"{folder.uri} was held by {_holder(found)}; watching for up to {SILENT_SECONDS:.0f} s if it still is")
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT_SECONDS / 2))
        now = _read(folder)
        if now is None:
            return
        if now != found:
            raise _refusal(folder, found)


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        lease = dict(json.loads(folder.read(LEASE) or b"{}"))
    except ValueError:
        return None
    return lease if lease.keys() >= _FIELDS else None


def _this_process() -> dict[str, Any]:
    """Its identity: host, boot, container and start time."""
    machine = socket.gethostname()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{machine} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return {"machine": machine, "began": psutil.Process().create_time()}


def _lives(lease: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(lease["pid"])
        return abs(process.create_time() - lease["began"]) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _holder(lease: dict[str, Any]) -> Holder:
    return Holder(*(lease[name] for name in _HOLDER))


def _refusal(folder: Folder, lease: dict[str, Any]) -> UserError:
    return in_use("scaling.storage", folder.uri, _holder(lease))
