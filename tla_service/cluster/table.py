"""A table's runs on the workers of a Ray cluster, which need no folder in common with the driver.

A worker gets the run's files, works in a folder of its own, and hands over what has changed, every minute and at the
end. The driver's state folder is the only one that lasts, so a worker that dies costs what it did since.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayTaskError

from tla_service.cluster.session import ray_session
from tla_service.cluster.shards import Slots, find_slots
from tla_service.config.loading import CONFIG
from tla_service.errors import UnavailableError
from tla_service.files import write_whole
from tla_service.job import INTERRUPTED
from tla_service.results.measure import MEASURED, ORDER
from tla_service.results.places import LOST, Running, Work, start_process
from tla_service.results.reproduce import reproduce
from tla_service.results.settings import ReproduceSettings
from tla_service.training.checkpoint import MANIFEST, verify_checkpoint
from tla_service.training.output import SUMMARY

HAND_OVER_SECONDS = 60.0
# Written last: each makes the files before it count.
_MARKS = (MANIFEST, ORDER, SUMMARY, MEASURED)
Files = dict[str, bytes]


def reproduce_on_ray(settings: ReproduceSettings) -> int:
    """Remake a table on a cluster; as `reproduce` otherwise.

    Raises:
        UserError: As there; also when no cluster answers, or none of its nodes has room for a run.
    """
    with ray_session(settings, debug=settings.debug):
        slots = find_slots(settings.scaling)
        return reproduce(settings, RayPlaces(slots, min(slots.count, settings.side_by_side or slots.count)))


@dataclass(frozen=True)
class RayPlaces:
    """Workers of the cluster.

    Attributes:
        slots: What each reserves.
        count: How many at a time.
    """

    slots: Slots
    count: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.count} of {self.slots} at a time"

    def start(self, work: Work, state: Path) -> Running:
        """Send the run's files to a worker that has room, and begin there."""
        worker = ray.remote(Worker).options(
            num_cpus=self.slots.cpus, num_gpus=self.slots.gpus, max_restarts=0, max_concurrency=3
        )
        return RayRunning(worker.remote(work, dict(files_for(work, state)), self.slots.cpus), work, state)


class Worker:
    """Works on one stage in a folder of its own; an actor.

    Args:
        work: What.
        files: The run's files, by their paths below the state folder.
        cpus: Cores it may use.
    """

    def __init__(self, work: Work, files: Files, cpus: float) -> None:
        self._work, self._threads = work, max(1, int(cpus))
        self._state = Path(tempfile.mkdtemp(prefix="tla-table-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        write_files(self._state, files)
        self._handed_over = self._look()

    def run(self) -> int:
        """Work to the end; the exit code."""
        if self._stopped:
            return INTERRUPTED
        # What this worker can import, its process must find as well; and of GPUs just what Ray has given.
        variables = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in ray.get_gpu_ids())
        self._process = start_process(self._work, self._state, self._threads, variables)
        return self._process.wait()

    def changed(self) -> tuple[Files, list[str]]:
        """Files that are new or have changed since the last call, and those that are gone."""
        now = self._look()
        fresh: Files = {}
        for name, mark in now.items():
            if self._handed_over.get(name) != mark:
                try:
                    fresh[name] = (self._state / name).read_bytes()
                except FileNotFoundError:  # gone in between: the next call tells
                    continue
        gone = [name for name in self._handed_over if name not in now]
        self._handed_over = now
        return fresh, gone

    def stop(self) -> None:
        """Ask the process to save and end."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._state, ignore_errors=True)

    def _look(self) -> dict[str, tuple[int, int]]:
        """Size and time of each of the run's files."""
        folder = self._state / self._work.name
        found = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(self._state)
            try:
                if path.is_file() and _is_whole(name):
                    found[name.as_posix()] = (path.stat().st_size, path.stat().st_mtime_ns)
            except FileNotFoundError:
                continue
        return found


class RayRunning:
    """Work on a worker, seen from the driver.

    Args:
        worker: The actor.
        work: What it works on.
        state: Where its files belong.
    """

    def __init__(self, worker: Any, work: Work, state: Path) -> None:
        self._worker, self._work, self._state = worker, work, state
        self._code = worker.run.remote()
        self._hand_over: Any = None
        self._last = time.monotonic()

    def poll(self) -> int | Literal["lost"] | None:
        """The exit code with all files here, `LOST`, or None; takes what was handed over."""
        try:
            if _is_ready(self._code):
                return self._end()
            if self._hand_over is not None and _is_ready(self._hand_over):
                self._take(self._hand_over)
                self._hand_over, self._last = None, time.monotonic()
            elif self._hand_over is None and time.monotonic() - self._last > HAND_OVER_SECONDS:
                self._hand_over = self._worker.changed.remote()
        except RayActorError:
            return self._lost()
        except RayTaskError as error:
            raise error.cause from error
        return None

    def stop(self) -> None:
        """Ask it to save and end."""
        self._worker.stop.remote()

    def finish(self, seconds: float) -> int | Literal["lost"]:
        """Wait for its end; when the time is up, leave what it has not handed over."""
        try:
            ready, _ = ray.wait([self._code], timeout=seconds)
            if ready:
                return self._end()
        except RayActorError:
            return self._lost()
        ray.kill(self._worker)
        return self._lost()

    def _end(self) -> int:
        code: int = ray.get(self._code)
        if self._hand_over is not None:
            self._take(self._hand_over)
        self._take(self._worker.changed.remote())
        ray.get(self._worker.clear.remote())
        ray.kill(self._worker)
        return code

    def _take(self, reference: Any) -> None:
        files, gone = ray.get(reference)
        write_files(self._state, files)
        for name in gone:
            path = self._state / name
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are in it
                path.parent.rmdir()

    def _lost(self) -> Literal["lost"]:
        """A checkpoint that was handed over in part is of no use: the one before it is gone on from."""
        for manifest in (self._state / self._work.name / "checkpoints").glob(f"*/{MANIFEST}"):
            try:
                verify_checkpoint(manifest.parent)
            except UnavailableError:
                shutil.rmtree(manifest.parent)
        return LOST


def files_for(work: Work, state: Path) -> Iterator[tuple[str, bytes]]:
    """What a worker needs of the state folder: all of the run, and of the surrogate its weights."""
    folders = [state / work.name]
    if work.surrogate is not None:
        other = state / work.surrogate
        folders += [other / "checkpoints", other / CONFIG]
    for folder in folders:
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
            if path.is_file() and _is_whole(path.relative_to(state)):
                yield path.relative_to(state).as_posix(), path.read_bytes()


def write_files(state: Path, files: Files) -> None:
    """Write files, each whole or not at all."""
    for name in sorted(files, key=lambda name: (name.rpartition("/")[2] in _MARKS, name)):
        path = state / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, files[name])


def _is_whole(path: Path) -> bool:
    """What is being written, or was when a process was killed, has a dot in front of its name or its folder's."""
    return not any(part.startswith(".") for part in path.parts)


def _is_ready(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])
