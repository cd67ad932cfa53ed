"""A sweep's plan, and when it ends early: budgets, failures in a row, signals and errors."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.stopper import Stopper
from torch import Tensor

from tla_service.cluster.attempts import DriverCallback, add_attempt, read_trials, seconds_before
from tla_service.cluster.session import Placement
from tla_service.errors import UnavailableError, UserError
from tla_service.tuning.space import Space


@dataclass(frozen=True)
class Plan:
    """A sweep that is about to run."""

    space: Space
    storage: str  # folder or s3:// prefix
    placement: Placement  # workers of a trial
    weights: Mapping[str, Tensor] | None  # state dict that trials start from
    max_concurrent: int
    wait_seconds: float = 0.0  # for the first trial's workers; 0: forever
    repeat_failed: bool = False  # run failed trials again

    @property
    def gpus(self) -> float:
        """GPUs of a trial, or its workers if there are no GPUs."""
        return self.placement.num_workers * (self.placement.gpus_per_worker if self.placement.use_gpu else 1.0)


class Budget(Stopper, DriverCallback):
    """Ends the sweep when its budget is used, too many trials failed, on a signal, or on an error."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._began = time.monotonic()
        self._worker_seconds = sum(trial.worker_seconds for trial in read_trials(plan.storage))
        self._seconds_before = seconds_before(plan.storage)
        self._running: dict[str, tuple[float, float]] = {}  # worker seconds, and when they were reported
        self._has_begun, self._failures = False, 0
        self.interrupted = False
        self.error: UserError | None = None
        self.gave_up = ""  # why, if too many trials failed one after another

    @property
    def wall_seconds(self) -> float:
        """Wall time over all attempts."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def seconds_left(self) -> float | None:
        """What is left of `sweep.max_hours`; None: there is no such limit."""
        hours = self._plan.space.sweep.max_hours
        return None if hours is None else max(0.0, 3600 * hours - self.wall_seconds)

    @property
    def gpu_hours(self) -> float:
        """GPU hours over all attempts; worker hours if there are no GPUs."""
        now = time.monotonic()
        running = sum(seconds + now - told for seconds, told in self._running.values())
        return (self._worker_seconds + running) * self._plan.gpus / 3600

    @property
    def used_up(self) -> str:
        """Which part of the budget is used up, or why the sweep gave up."""
        sweep = self._plan.space.sweep
        if self.seconds_left == 0:
            return f"sweep.max_hours={sweep.max_hours:g} are over"
        if sweep.max_gpu_hours is not None and self.gpu_hours >= sweep.max_gpu_hours:
            return f"sweep.max_gpu_hours={sweep.max_gpu_hours:g} are used"
        return self.gave_up

    def fail(self, error: UserError) -> None:
        """End the sweep with this error."""
        self.error = self.error or error

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether to end all trials now; they keep their checkpoints."""
        wait = self._plan.wait_seconds
        if wait and not self._has_begun and time.monotonic() - self._began > wait:
            reason = "the cluster has not placed any trial's workers in this time"
            self.fail(UnavailableError("scaling.wait_seconds", wait, reason, "ask for fewer workers, or wait longer"))
        return self.interrupted or self.error is not None or bool(self.used_up)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Count its workers' time; the first report comes when they start."""
        self._has_begun = True
        if result["error"]:
            self.fail(UnavailableError(*result["error"]))
        self._running[trial.trial_id] = (result["worker_seconds"], time.monotonic())

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Count failures in a row."""
        self.on_trial_recover(iteration, trials, trial)
        ended = add_attempt({}, trial)
        self._failures = self._failures + 1 if ended.status == "failed" else 0
        if self._failures >= self._plan.space.sweep.failures_in_a_row:
            self.gave_up = f"{self._failures} trials failed one after another, the last: {ended.reason}"

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its process died too often."""
        self.on_trial_complete(iteration, trials, trial)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its process died and is restarted; its workers' time starts from 0."""
        self._worker_seconds += self._running.pop(trial.trial_id, (0.0, 0.0))[0]


@contextlib.contextmanager
def stop_on_signal(budget: Budget) -> Iterator[None]:
    """First SIGINT or SIGTERM: end the sweep in good order; second: KeyboardInterrupt."""

    def handle(_signal: int, _frame: object) -> None:
        if budget.interrupted:
            raise KeyboardInterrupt
        budget.interrupted = True
        os.write(2, b"stopping the sweep; interrupt again to stop at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
