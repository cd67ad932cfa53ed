"""One driver a sweep: who drives it, since when, and for how long it has been driven in all."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tla_service.errors import UnavailableError, UserError
from tla_service.tuning.journal import OWNER_FILE, Journal

BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0  # after this long without a beat a driver counts as dead


class Lease:
    """Holds a sweep for this process, and says so every few seconds in its storage.

    Args:
        journal: The sweep's files.
        lost: Called, once, when another driver has taken the sweep, or the storage has gone.

    Raises:
        UnavailableError: Another driver is at work.
    """

    def __init__(self, journal: Journal, lost: Callable[[UserError], None]) -> None:
        self._journal, self._lost = journal, lost
        self._id = uuid.uuid4().hex
        before = json.loads(journal.read(OWNER_FILE) or "{}")
        if before and _is_alive(before):
            raise UnavailableError(
                "resume",
                None,
                f"another driver (process {before['pid']} on {before['host']}) is at work on this sweep, last seen "
                f"{time.time() - before['seen']:.0f} s ago",
                f"end it first; one that was lost with its machine counts as gone after {SILENT_SECONDS:.0f} s",
            )
        self.seconds_before = before.get("seconds", 0.0)
        self.attempt = before.get("attempt", 0) + 1
        self._began = time.time()
        self._write()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sweep-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the sweep free."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        self._write(seen=0.0)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                holder = json.loads(self._journal.read(OWNER_FILE) or "{}")
                if holder.get("id") != self._id:
                    raise UnavailableError(
                        "resume", None, "another driver has taken this sweep", "leave it to that one"
                    )
                self._write()
            except UserError as error:
                self._over.set()
                self._lost(error)
                return

    def _write(self, seen: float | None = None) -> None:
        now = time.time()
        fields = {
            "id": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "attempt": self.attempt,
            "seen": now if seen is None else seen,
            "seconds": self.seconds_before + now - self._began,
        }
        self._journal.write(OWNER_FILE, json.dumps(fields))


def _is_alive(driver: dict[str, object]) -> bool:
    """Whether a driver may still be at work; on this machine its process is looked for."""
    if time.time() - float(str(driver["seen"])) > SILENT_SECONDS:
        return False
    if driver["host"] != socket.gethostname():
        return True
    return Path(f"/proc/{driver['pid']}").exists() if Path("/proc/self").exists() else True
