"""Attempts at a sweep, each a Ray Tune experiment: its trials, what earlier attempts found, and when one ends early."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.stopper import Stopper
from torch import Tensor

from tla_service.cluster.lease import Lease
from tla_service.cluster.placement import Placement
from tla_service.cluster.storage import Folder
from tla_service.cluster.train import Record, fit_on_ray
from tla_service.errors import UnavailableError, UserError
from tla_service.tuning.space import Space
from tla_service.tuning.trials import Progress, Trial

SNAPSHOT = "trials.json"
OUTAGE_SECONDS = 600.0
QUEUE_SECONDS = 7 * 24 * 3600
# In the last line of a worker's error. A restart would end the same way.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Plan:
    """A sweep that is about to run."""

    space: Space
    storage: str  # folder or s3:// prefix
    placement: Placement  # workers of a trial
    weights: Mapping[str, Tensor] | None  # state dict that trials start from
    max_concurrent: int
    epochs: int  # of a trial
    repeat: bool = False  # run given points of a grid again, those of failed and finished trials too
    code: bytes | None = None  # of a network of the user's


def run_trial(config: Mapping[str, Any], plan: Plan) -> None:
    """Train one trial, of which `config` has number and point, from its last checkpoint or the plan's weights."""
    # A trial waits for its resources as long as the others take, instead of asking again every minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(QUEUE_SECONDS))
    progress = Progress()

    def follow(record: Record) -> None:
        message = progress.add(record)
        if message is None:
            return
        tune.report(progress.report(message))
        if record["event"] == "failure" and any(words in message.lower() for words in _OUT_OF_MEMORY):
            raise MemoryError(message)

    try:
        run = plan.space.trial(config["trial"]["number"], config["trial"]["point"], plan.placement.num_workers)
        progress.selected_by = run.selected_by
        storage, measure_test = f"{plan.storage}/trials", plan.space.sweep.measure_test
        result, _ = fit_on_ray(
            run, plan.placement, storage, follow, plan.weights, measure_test=measure_test, code=plan.code
        )
    except UnavailableError as error:  # storage or data are away: that ends the sweep, and the trial can be resumed
        report = progress.report(outcome="unavailable", reason=error.reason, error=error.args)
    except Exception as error:  # noqa: BLE001 - whatever ends a trial is recorded with it and does not end the sweep
        report = progress.report(outcome="failed", reason=reason_of(error))
    else:
        progress.add_history(result.history)  # a run that had finished before an interruption reports no epoch again
        report = progress.report(outcome="finished", test=result.test)
    tune.report(report)


def reason_of(error: Exception) -> str:
    """An error in one line, with its class unless it is one of ours."""
    text = " ".join(str(error).split())[:500]
    return text if type(error).__module__.startswith("tla_service.") else f"{type(error).__name__}: {text}"


def attempts(storage: str) -> list[str]:
    """Names of the sweep's attempts, in order."""
    return [name for name in Folder(storage).folders() if name.startswith("tune-")]


def read_trials(storage: str) -> list[Trial]:
    """All trials of all attempts in a folder or s3:// prefix, by number."""
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

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its process died too often."""
        self.on_trial_complete(iteration, trials, trial)


class Snapshots(DriverCallback):
    """Keeps a complete copy of Ray Tune's snapshot; calls `fail` if none could be written for `OUTAGE_SECONDS`.

    Ray Tune overwrites its own in place, so a driver that is killed meanwhile, or a full disk, leaves half of one.
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


class Budget(Stopper, DriverCallback):
    """Ends the sweep when its budget is used, too many trials failed, on a signal, or on an error."""

    def __init__(self, plan: Plan, lease: Lease | None = None) -> None:
        self._plan, self._lease = plan, lease or Lease()
        self._began = time.monotonic()
        self._worker_seconds = sum(trial.worker_seconds for trial in read_trials(plan.storage))
        self._seconds_before = seconds_before(plan.storage)
        self._running: dict[str, tuple[float, float]] = {}  # worker seconds, and when they were reported
        self._before: dict[str, dict[str, Any]] = {}  # last report of a trial whose process died
        self._has_begun, self._failures = False, 0
        self.interrupted = False
        self.error: UserError | None = None
        self.gave_up = ""  # why, if too many trials failed one after another

    @property
    def wall_seconds(self) -> float:
        """Wall time over all attempts."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def gpu_hours(self) -> float:
        """GPU hours over all attempts; worker hours if there are no GPUs."""
        now, placement = time.monotonic(), self._plan.placement
        running = sum(seconds + now - told for seconds, told in self._running.values())
        gpus = placement.num_workers * (placement.gpus_per_worker if placement.use_gpu else 1.0)  # of a trial
        return (self._worker_seconds + running) * gpus / 3600

    @property
    def used_up(self) -> str:
        """Which part of the budget is used up, or why the sweep gave up."""
        sweep = self._plan.space.sweep
        if sweep.max_hours is not None and self.wall_seconds >= 3600 * sweep.max_hours:
            return f"sweep.max_hours={sweep.max_hours:g} are over"
        if sweep.max_gpu_hours is not None and self.gpu_hours >= sweep.max_gpu_hours:
            return f"sweep.max_gpu_hours={sweep.max_gpu_hours:g} are used"
        return self.gave_up

    def fail(self, error: UserError) -> None:
        """End the sweep with this error."""
        self.error = self.error or error

    def interrupt(self) -> None:
        """End the sweep in good order."""
        self.interrupted = True

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether to end all trials now; they keep their checkpoints."""
        wait = self._plan.space.run.scaling.wait_seconds  # 0: forever
        if wait and not self._has_begun and time.monotonic() - self._began > wait:
            reason = "the cluster has not placed any trial's workers in this time"
            self.fail(UnavailableError("scaling.wait_seconds", wait, reason, "ask for fewer workers, or wait longer"))
        self.error = self.error or self._lease.error
        return self.interrupted or self.error is not None or bool(self.used_up)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Count its workers' time, from when they are placed."""
        if result["error"]:
            self.fail(UnavailableError(*result["error"]))
        if result["worker_seconds"]:  # else its workers are waited for
            self._has_begun = True
            self._running[trial.trial_id] = (result["worker_seconds"], time.monotonic())
        if trial.trial_id in self._before:
            before = self._before[trial.trial_id]
            result |= {name: result[name] + before[name] for name in ("worker_seconds", "time_total_s", "restarts")}

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Count failures in a row."""
        self._worker_seconds += self._running.pop(trial.trial_id, (0.0, 0.0))[0]
        ended = add_attempt({}, trial)
        self._failures = self._failures + 1 if ended.status == "failed" else 0
        if self._failures >= self._plan.space.sweep.failures_in_a_row:
            self.gave_up = f"{self._failures} trials failed one after another, the last: {ended.reason}"

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its process died and is restarted; the next one counts from 0."""
        if trial.trial_id in self._running:
            seconds, told = self._running.pop(trial.trial_id)
            since = time.monotonic() - told
            self._worker_seconds += seconds + since
            trial.last_result["worker_seconds"] += since
        if "worker_seconds" in trial.last_result:
            self._before[trial.trial_id] = trial.last_result
