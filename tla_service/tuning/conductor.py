"""Runs a sweep without knowing on what: chooses trials, takes their records, stops those behind, keeps to the budget.

All that lasts is in the journal. A conductor made again from it goes on where the last one was killed.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tla_service.config import RunConfig
from tla_service.tuning.journal import Journal
from tla_service.tuning.rungs import is_behind, milestones, rung_reached
from tla_service.tuning.search import propose
from tla_service.tuning.space import Space
from tla_service.tuning.trial import Attempt, Status, Trial

DEFAULT_SAMPLES = 16


class Listener(Protocol):
    """Is told what happens to trials."""

    def began(self, trial: Trial, run: RunConfig) -> None:
        """A trial begins, or goes on."""

    def epoch(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """It has done an epoch."""

    def told(self, trial: Trial, message: str) -> None:
        """Something happened to it."""

    def ended(self, trial: Trial) -> None:
        """It has ended for good."""


class Conductor:
    """The course of a sweep.

    Args:
        space: What is searched, and how.
        name: The sweep's name; trials are named after it.
        journal: Where trials are kept.
        listener: Is told.
        gpus_a_trial: What a trial costs: its GPUs, or its workers where there are no GPUs.
        seconds_before: Wall time of earlier attempts.
        num_workers: Workers a trial.
    """

    def __init__(
        self,
        space: Space,
        name: str,
        journal: Journal,
        listener: Listener,
        *,
        num_workers: int,
        gpus_a_trial: float = 0.0,
        seconds_before: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.space, self.name, self.trials = space, name, journal.trials()
        self._journal, self._listener, self._clock = journal, listener, clock
        self._num_workers, self._gpus_a_trial = num_workers, gpus_a_trial
        self.began, self._seconds_before = clock(), seconds_before
        self._left = [trial for trial in self.trials if trial.status == "running"]
        self._failures = 0
        self.halted = ""  # why nothing more is to be done, if so

    # ------------------------------------------------------------------------------------------------ choosing

    def choose(self) -> tuple[Trial, RunConfig] | None:
        """The next trial and its run: first those that were under way, then new ones; None when there is no other.

        Raises:
            UnavailableError: The storage cannot be written.
        """
        if self.is_over():
            return None
        if self._left:
            trial = self._left.pop(0)
        else:
            new = self._propose()
            if new is None:
                return None
            trial = new
            self.trials.append(trial)
        trial.attempts.append(Attempt(chosen=self._clock(), last=self._clock()))
        self._journal.save(trial)
        run = self.run_of(trial)
        self._listener.began(trial, run)
        return trial, run

    def run_of(self, trial: Trial) -> RunConfig:
        """The run of a trial."""
        run = self.space.apply(trial.point)
        # A trial waits for its place as long as the others take; how long all of them may wait is the driver's affair.
        scaling = run.scaling.model_copy(update={"num_workers": self._num_workers, "wait_seconds": 0.0})
        return run.model_copy(update={"name": f"{self.name}-{trial.number:04d}", "scaling": scaling})

    def is_done(self) -> bool:
        """Whether every trial there is to be has ended."""
        return not self._left and self._propose() is None

    def is_over(self) -> bool:
        """Whether the budget is used up or something ended the sweep; then running trials are to stop too."""
        sweep = self.space.sweep
        if not self.halted and sweep.max_hours is not None and self.wall_seconds >= 3600 * sweep.max_hours:
            self.halted = f"sweep.max_hours={sweep.max_hours:g} are over"
        if not self.halted and sweep.max_gpu_hours is not None and self.gpu_hours >= sweep.max_gpu_hours:
            self.halted = f"sweep.max_gpu_hours={sweep.max_gpu_hours:g} are used"
        return bool(self.halted)

    @property
    def wall_seconds(self) -> float:
        """Wall time of all attempts."""
        return self._seconds_before + self._clock() - self.began

    @property
    def gpu_hours(self) -> float:
        """What the workers have used so far, from their start to the end of their trial."""
        now = self._clock()
        seconds = sum(
            (attempt.ended or (now if attempt.chosen >= self.began else attempt.last)) - attempt.trained
            for trial in self.trials
            for attempt in trial.attempts
            if attempt.trained
        )
        return seconds * (self._gpus_a_trial or self._num_workers) / 3600

    @property
    def num_training(self) -> int:
        """Trials whose workers train now."""
        here = [trial for trial in self.trials if trial.status == "running" and trial.attempts]
        return sum(trial.attempts[-1].chosen >= self.began and trial.attempts[-1].trained > 0 for trial in here)

    @property
    def has_begun(self) -> bool:
        """Whether workers of any trial have trained since this conductor began."""
        return any(stay.trained for trial in self.trials for stay in trial.attempts if stay.chosen >= self.began)

    @property
    def failed_for(self) -> str:
        """Why the sweep gave up, if too many trials failed one after another."""
        return self.halted if self._failures >= self.space.sweep.failures_in_a_row else ""

    # ------------------------------------------------------------------------------------------------ following

    def take(self, number: int, record: Mapping[str, Any]) -> bool:
        """Take a record of a trial: `begin`, `start`, `epoch`, `failure`, `end` or `failed`.

        Returns:
            Whether the trial is to be stopped.

        Raises:
            UnavailableError: The storage cannot be written.
        """
        trial = self.trials[number]
        attempt = trial.attempts[-1]
        attempt.last = self._clock()
        match record["event"]:
            case "begin":
                attempt.began = record["time"]
            case "start":
                attempt.trained = attempt.trained or record["time"]
                self._listener.told(trial, "goes on from its last checkpoint" if record["resumed"] else "trains")
                return any(self._epoch(trial, metrics) for metrics in record["history"])
            case "epoch":
                attempt.last_epoch = record["time"]
                return self._epoch(trial, record["metrics"])
            case "failure":
                trial.restarts += 1
                self._listener.told(trial, record["message"])
            case "end":
                self._end(trial, record)
            case "failed":
                self._close(trial, "failed", record["reason"])
        return False

    def lose(self, number: int, reason: str) -> None:
        """Take note that a trial's own process died more often than it is started again."""
        if self.trials[number].status == "running":
            self._close(self.trials[number], "failed", reason)

    def _epoch(self, trial: Trial, metrics: Mapping[str, float]) -> bool:
        self._listener.epoch(trial, metrics)
        if not trial.add_report(metrics):
            return False
        behind = self._is_behind(trial)
        if behind:
            # With the report, in one write: a driver killed here has either both or neither.
            self._close(trial, "stopped", behind)
        else:
            self._journal.save(trial)
        return bool(behind)

    def _is_behind(self, trial: Trial) -> str:
        sweep = self.space.sweep
        if sweep.scheduler == "none":
            return ""
        epochs = self.run_of(trial).training.epochs
        grace = sweep.grace_epochs or max(1, epochs // 9)
        milestone = rung_reached(trial, milestones(grace, sweep.reduction_factor, epochs))
        objective = sweep.objectives[0]
        if milestone is None or not is_behind(trial, self.trials, milestone, objective, sweep.reduction_factor):
            return ""
        return f"behind the others at epoch {milestone:g}"

    def _end(self, trial: Trial, record: Mapping[str, Any]) -> None:
        for metrics in record["history"]:
            self._listener.epoch(trial, metrics)
            trial.add_report(metrics)
        trial.test, trial.wall_seconds = dict(record["test"]), dict(record["wall_seconds"])
        self._close(trial, "finished", "")

    def _close(self, trial: Trial, status: Status, reason: str) -> None:
        trial.status, trial.reason = status, reason
        trial.attempts[-1].ended = self._clock()
        self._journal.save(trial)
        self._listener.ended(trial)
        self._failures = self._failures + 1 if status == "failed" else 0
        if self._failures >= self.space.sweep.failures_in_a_row:
            self.halted = f"{self._failures} trials failed one after another, the last: {reason}"

    def _propose(self) -> Trial | None:
        number, sweep = len(self.trials), self.space.sweep
        limit = sweep.num_samples
        if limit is None and sweep.searcher != "grid":
            limit = DEFAULT_SAMPLES
        if limit is not None and number >= limit:
            return None
        point = propose(self.space, number, self.trials)
        return None if point is None else Trial(number, point)
