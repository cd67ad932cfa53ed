"""Metrics are written to disk before they are sent, so that an unavailable server loses none.

The file is the queue, so memory stays bounded during an outage. What the server has not confirmed when the process is
killed is sent by the next log of the same run.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from mlflow.entities import Metric

from tla_service.errors import one_line, without_credentials
from tla_service.tracking.connection import client

_BATCH = 1000  # MLflow's limit of metrics in one request
_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 0.5, 30.0
_log = logging.getLogger(__name__)

Point = tuple[str, float, int, int]  # key, value, timestamp in ms, step


class RunLog:
    """Sends metrics of one run from a background thread; the caller never waits for the server.

    A point (key, step) is sent once: what the server has already, from before a restart, is skipped. A run has
    one log at a time. `spill_dir` has the unsent metrics, also those of an ended process.
    """

    def __init__(self, uri: str, run_id: str, spill_dir: str | Path) -> None:
        self._uri, self._address, self._run_id = uri, without_credentials(uri), run_id
        self._changed = threading.Condition()
        self._path = Path(spill_dir) / f"{run_id}.jsonl"
        self._file = _open(self._path)
        self._sent_bytes = 0
        self._known: dict[str, set[int]] | None = None  # key -> steps on the server; None: unknown
        self._unasked: set[str] = set()  # keys on the server whose steps are not in `_known` yet
        self._api: Any = None
        self._closing = self._broken = False
        self._thread = threading.Thread(target=self._work, name="run-log", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue metrics of one epoch or optimizer step; returns at once."""
        now = int(time.time() * 1000)
        lines = [json.dumps([key, float(value), now, int(step)]) + "\n" for key, value in metrics.items()]
        with self._changed:
            if self._closing:
                raise ValueError("this log is closed")
            try:
                self._file.write("".join(lines).encode())
                self._file.flush()
            except OSError as error:
                if not self._broken:
                    _log.warning("Metrics cannot be kept in %s (%s) and are lost", self._path, error)
                self._broken = True
            self._changed.notify_all()

    def log_epoch(self, metrics: Mapping[str, float]) -> None:
        """Queue an epoch's metrics, of which `epoch` is the step."""
        self.log({name: value for name, value in metrics.items() if name != "epoch"}, int(metrics["epoch"]))

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until the server has everything logged so far; False on a timeout, which loses nothing."""
        with self._changed:
            return self._changed.wait_for(lambda: self.unsent_bytes() == 0, timeout_seconds)

    def unsent_bytes(self) -> int:
        """Bytes on disk that the server has not confirmed yet."""
        with self._changed:
            # Of the file itself: what a full disk refused stays in the buffer, and every seek raises again.
            return 0 if self._file.closed else os.fstat(self._file.fileno()).st_size - self._sent_bytes

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """Send what is left and stop; returns whether all was sent. The rest stays on disk for the next log."""
        if self._closing:
            return not self._path.exists()
        self.flush(timeout_seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=5.0)
        with self._changed:
            done = self.unsent_bytes() == 0
            if done:
                self._path.unlink(missing_ok=True)
            else:
                _log.warning("Metrics of run %s that could not be sent are kept in %s", self._run_id, self._path)
            with contextlib.suppress(OSError):  # what the disk had no room for
                self._file.close()
        return done

    def _work(self) -> None:
        failures = 0
        while True:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self.unsent_bytes() > 0)
                    if self._closing:
                        return
                    points, end = self._read()
                self._send(points)
                self._confirm(end)
            except Exception as error:  # noqa: BLE001 - no error here may stop training
                failures += 1
                self._failed(error, failures)
            else:
                if failures > 1:
                    _log.warning("The tracking server %s is back; sending metrics again", self._address)
                failures = 0

    def _read(self) -> tuple[list[Point], int]:
        """The next lines of the file, and where they end."""
        points: list[Point] = []
        self._file.seek(self._sent_bytes)
        while len(points) < _BATCH and (line := self._file.readline()):
            with contextlib.suppress(ValueError, TypeError):
                key, value, timestamp, step = json.loads(line)
                points.append((str(key), float(value), int(timestamp), int(step)))
        return points, self._file.tell()

    def _confirm(self, end: int) -> None:
        with self._changed:
            if self._file.closed:
                return
            self._sent_bytes = end
            if self.unsent_bytes() == 0:
                self._file.truncate(0)
                self._sent_bytes = 0
            self._changed.notify_all()

    def _failed(self, error: Exception, failures: int) -> None:
        self._known = None  # the request may have arrived all the same
        if failures == 2:  # a single failure is often a closed connection
            message = "The tracking server %s takes no metrics (%s); they are kept in %s until it does"
            _log.warning(message, self._address, one_line(error), self._path)
        wait = min(_FIRST_WAIT_SECONDS * 2 ** min(failures - 1, 10), _LAST_WAIT_SECONDS)
        with self._changed:
            self._changed.wait_for(lambda: self._closing, wait)

    def _send(self, points: list[Point]) -> None:
        """Send what the server does not have."""
        self._api = self._api or client(self._uri)
        fresh: dict[tuple[str, int], Metric] = {}
        for key, value, timestamp, step in points:
            if step not in self._steps(key):
                fresh.setdefault((key, step), Metric(key, value, timestamp, step))
        if fresh:
            self._api.log_batch(self._run_id, metrics=list(fresh.values()))
        for key, step in fresh:
            self._steps(key).add(step)

    def _steps(self, key: str) -> set[int]:
        """Steps of a metric that the server has, requested once."""
        if self._known is None:
            self._unasked = set(self._api.get_run(self._run_id).data.metrics)
            self._known = {}
        if key not in self._known:
            history = self._api.get_metric_history(self._run_id, key) if key in self._unasked else ()
            self._known[key] = {point.step for point in history}
        return self._known[key]


def _open(path: Path) -> IO[bytes]:
    """Open the file of a run, with what an earlier process left in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    if path.stat().st_size:
        file.write(b"\n")  # a process killed while writing leaves half a line
    for left in path.parent.glob(f"{path.stem}-*.jsonl"):  # earlier versions had a file for each process
        file.write(left.read_bytes() + b"\n")
        file.flush()
        left.unlink()
    return file
