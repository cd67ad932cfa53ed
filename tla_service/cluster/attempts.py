"""Attempts at a sweep: each is a Ray Tune experiment of its own, and later ones read the results of earlier ones."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from tla_service.cluster.folder import Folder
from tla_service.errors import UnavailableError
from tla_service.tuning.trials import Trial

SNAPSHOT = "trials.json"
OUTAGE_SECONDS = 600.0


def attempts(storage: str) -> list[str]:
    """Names of the sweep's attempts, in order."""
    return [name for name in Folder(storage).folders() if name.startswith("tune-")]


def new_attempt(storage: str) -> str:
    """Name of the next attempt."""
    return f"tune-{max((int(name.removeprefix('tune-')) for name in attempts(storage)), default=0) + 1:03d}"


def read_trials(storage: str) -> list[Trial]:
    """All trials of all attempts in a folder or s3:// prefix, by number.

    Raises:
        UnavailableError: The storage, or a snapshot in it, cannot be read.
    """
    # It warns about the loggers' files, which are not written.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    place, trials = Folder(storage), dict[int, Trial]()
    for attempt in attempts(storage):
        if place.read(f"{attempt}/{SNAPSHOT}") is None:
            continue  # its driver was killed before the first trial
        path = f"{place.path}/{attempt}/{SNAPSHOT}"
        try:
            analysis = tune.ExperimentAnalysis(path, storage_filesystem=place.filesystem)
        except (OSError, ValueError, KeyError) as error:
            raise place.unavailable(error) from error
        for each in analysis.trials:
            add_attempt(trials, each)
    return [trials[number] for number in sorted(trials)]


def add_attempt(trials: dict[int, Trial], found: TuneTrial) -> Trial:
    """Add what a Tune trial reports to the trials by number; returns the trial it is about."""
    number, point = found.config["trial"]["number"], found.config["trial"]["point"]
    trial = trials.setdefault(number, Trial(number, point))
    trial.add_attempt(found.last_result or {}, found.num_failures if found.status == TuneTrial.ERROR else 0)
    return trial


def seconds_before(storage: str) -> float:
    """Wall time of all attempts: each from its start to its last snapshot."""
    place, seconds = Folder(storage), 0.0
    for attempt in attempts(storage):
        name = f"{attempt}/{SNAPSHOT}"
        text = place.read(name)
        if text is not None:
            written = place.filesystem.get_file_info(f"{place.path}/{name}").mtime
            seconds += max(0.0, written.timestamp() - json.loads(text)["stats"]["start_time"])
    return seconds


class DriverCallback(tune.Callback):
    """A callback that stays in the driver: Ray Tune's snapshot need not hold its state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Snapshots(DriverCallback):
    """Keeps a copy of Ray Tune's snapshot that is always complete.

    Ray Tune overwrites its own in place, so a driver that is killed meanwhile, or a full disk, leaves half of one.

    Args:
        attempt: Folder or s3:// prefix of the attempt.
        fail: Ends the sweep; called if no copy could be written for `OUTAGE_SECONDS`.
    """

    def __init__(self, attempt: str, fail: Callable[[UnavailableError], None]) -> None:
        self._attempt, self._fail = Folder(attempt), fail
        self._copied: float | None = None
        self._last_success = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Copy the snapshot, if there is a new one."""
        if not trials or trials[0].storage is None:
            return
        staged = sorted(Path(trials[0].storage.experiment_driver_staging_path).glob("experiment_state-*"))
        if staged and (written := staged[-1].stat().st_mtime) != self._copied:
            try:
                self._attempt.write(SNAPSHOT, staged[-1].read_bytes())
            except UnavailableError as error:
                if time.monotonic() - self._last_success > OUTAGE_SECONDS:
                    self._fail(error)
            else:
                self._copied, self._last_success = written, time.monotonic()

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        """Copy the last one."""
        self.on_step_end(0, trials)
