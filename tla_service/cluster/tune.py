"""A sweep's trials on Ray Tune: OptunaSearch suggests, ASHA stops, and each attempt starts from what earlier ones know.

An attempt is a Tune experiment of its own (`tune-001`, `tune-002`, ...). `Tuner.restore` would lose ASHA's rungs and
could change neither the number of trials nor the budget (ray/tune/search/search_generator.py, tune_controller.py).
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.stopper import Stopper
from torch import Tensor

from tla_service.cluster.attempts import Snapshots, add_attempt, new_attempt, read_trials, seconds_before
from tla_service.cluster.session import Placement
from tla_service.cluster.slots import TRIAL_PROCESS_BYTES
from tla_service.cluster.trial import run_trial
from tla_service.errors import UnavailableError, UserError
from tla_service.tuning.space import Space, key_of
from tla_service.tuning.study import STUDY, distributions, sampler_of, study_of, to_params, to_point
from tla_service.tuning.trials import Trial, best_of

DEFAULT_SAMPLES = 16
SNAPSHOT_SECONDS = "2"
PROCESS_RESTARTS = 3
_ASKS = 100  # suggestions that may be refused before a point is drawn at random


@dataclass(frozen=True)
class Plan:
    """A sweep that is about to run.

    Attributes:
        space: What is searched, and how.
        storage: Its folder or s3:// prefix.
        placement: Workers of a trial.
        weights: State dict that trials start from, or None.
        max_concurrent: Trials at a time.
        wait_seconds: How long the first trial may wait for its workers; 0: for ever.
        repeat_failed: Whether failed trials are run again.
    """

    space: Space
    storage: str
    placement: Placement
    weights: Mapping[str, Tensor] | None
    max_concurrent: int
    wait_seconds: float = 0.0
    repeat_failed: bool = False

    @property
    def gpus(self) -> float:
        """What a trial costs: its GPUs, or its workers where there are no GPUs."""
        return self.placement.num_workers * (self.placement.gpus_per_worker if self.placement.use_gpu else 1.0)


def run_trials(plan: Plan, budget: "Budget", log: tune.Callback, *, debug: bool = False) -> None:
    """Run the trials that are left, in a new attempt.

    Args:
        plan: The sweep.
        budget: Ends it early.
        log: Follows the trials.
        debug: Show Ray Tune's own tables.
    """
    space, sweep = plan.space, plan.space.sweep
    before = read_trials(plan.storage)
    open_status = ("running", "failed") if plan.repeat_failed else ("running",)
    ended = [trial for trial in before if trial.status not in open_status]
    grid: list[dict[str, Any]] = []
    if sweep.searcher == "grid":
        done, numbers = (
            {key_of(trial.point) for trial in ended},
            {key_of(trial.point): trial.number for trial in before},
        )
        new = itertools.count(max(numbers.values(), default=-1) + 1)
        for point in space.grid()[: sweep.num_samples]:
            number = numbers[key_of(point)] if key_of(point) in numbers else next(new)
            if key_of(point) not in done:
                grid.append({"number": number, "point": point})
    num_left = len(grid) if sweep.searcher == "grid" else (sweep.num_samples or DEFAULT_SAMPLES) - len(ended)
    if num_left <= 0 or budget.stop_all():
        return
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = SNAPSHOT_SECONDS
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the snapshot and MLflow have it all
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "1" if debug else "0"  # the log has them in a line
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the budget takes note of signals
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables; --debug shows them
    attempt = new_attempt(plan.storage)
    trainable = tune.with_parameters(
        run_trial, space=space, placement=plan.placement, storage=f"{plan.storage}/trials", weights=plan.weights
    )
    tune.Tuner(
        tune.with_resources(trainable, {"memory": TRIAL_PROCESS_BYTES}),
        param_space={"trial": tune.grid_search(grid)} if grid else None,
        tune_config=tune.TuneConfig(
            search_alg=None if grid else searcher(space, before),
            scheduler=scheduler(space, ended),
            num_samples=1 if grid else num_left,
            max_concurrent_trials=plan.max_concurrent,
            time_budget_s=budget.seconds_left,
            trial_name_creator=name_of,
            trial_dirname_creator=name_of,
        ),
        run_config=tune.RunConfig(
            name=attempt,
            storage_path=plan.storage,
            stop=budget,
            callbacks=[log, budget, Snapshots(f"{plan.storage}/{attempt}", budget.fail)],
            failure_config=tune.FailureConfig(max_failures=PROCESS_RESTARTS),
            verbose=2 if debug else 0,
        ),
    ).fit()


def name_of(trial: TuneTrial) -> str:
    """Ray Tune's name of a trial."""
    return f"trial-{trial.config['trial']['number']:04d}-{trial.trial_id}"


# ---------------------------------------------------------------------------------------------------- what is next


def searcher(space: Space, before: Sequence[Trial]) -> "Search":
    """The searcher, which knows the trials of earlier attempts and suggests the unfinished ones first."""
    ended = [trial for trial in before if trial.status != "running"]
    running = {trial.number: trial.point for trial in before if trial.status == "running"}
    first = list(running.values())
    own = space.own_point() if space.sweep.own_first else None
    if own is not None and own not in [trial.point for trial in before]:
        first.append(own)
    objectives, storage = list(space.sweep.objectives), InMemoryStorage()
    study_of(space, ended, objectives, storage)
    is_single = len(objectives) == 1
    return Search(
        space,
        {key_of(trial.point) for trial in ended},
        {key_of(point): number for number, point in running.items()},
        max((trial.number for trial in before), default=-1) + 1,
        space=distributions(space),
        metric=objectives[0] if is_single else objectives,
        mode="max" if is_single else ["max"] * len(objectives),
        points_to_evaluate=[to_params(space, point) for point in first],
        sampler=sampler_of(space, len(before)),
        study_name=STUDY,
        storage=storage,
    )


class Search(OptunaSearch):
    """OptunaSearch that refuses points that are known or not allowed, and numbers the others.

    Args:
        where: What is searched.
        tried: Keys of the points that are not suggested again.
        numbers: Numbers of unfinished trials, by key.
        next_number: Number of the first new trial.
        options: Of OptunaSearch.
    """

    def __init__(
        self, where: Space, tried: set[str], numbers: Mapping[str, int], next_number: int, **options: Any
    ) -> None:
        super().__init__(**options)
        self._where, self._tried, self._numbers, self._next = where, tried, dict(numbers), next_number

    def suggest(self, trial_id: str) -> Any:
        """The next trial, or Ray Tune's word for the end: the space has no other point."""
        study: Any = self._ot_study
        for ask in range(_ASKS + 1):
            if ask == _ASKS:
                rng = np.random.default_rng([self._where.sweep.seed, self._next])
                point = self._where.random(rng, self._tried)
                if point is None:
                    break
                study.enqueue_trial(to_params(self._where, point))
            point = to_point(self._where, super().suggest(trial_id) or {})
            key = key_of(point)
            if key in self._numbers or (key not in self._tried and self._where.allows(point)):
                self._tried.add(key)
                number = self._numbers.pop(key, self._next)
                self._next = max(self._next, number + 1)
                return {"trial": {"number": number, "point": point}}
            study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: trials are compared by ASHA, and Optuna is told of their ends."""


def scheduler(space: Space, ended: Sequence[Trial]) -> ASHAScheduler | None:
    """ASHA with the rungs that earlier attempts filled; None if every trial runs to its end."""
    sweep, epochs = space.sweep, space.sweep.trial_epochs or space.run.training.epochs
    grace = sweep.grace_epochs or max(1, epochs // 9)
    if sweep.scheduler == "none" or grace >= epochs:
        return None
    objective = sweep.objectives[0]
    # Below a whole trial: who got to the end is not stopped there.
    asha = ASHAScheduler("epochs", objective, "max", epochs - 1, grace, sweep.reduction_factor, stop_last_trials=False)
    controller: Any = None  # not looked at; and of a trial its id alone
    for trial in ended:
        past: Any = SimpleNamespace(trial_id=f"earlier-{trial.number}")
        asha.on_trial_add(controller, past)
        for index, score in enumerate(trial.curve):
            best = best_of(trial.curve[: index + 1])
            asha.on_trial_result(controller, past, {"epochs": score.epochs, objective: getattr(best, objective)})
    return asha


# ---------------------------------------------------------------------------------------------------- when to end


class Budget(Stopper, tune.Callback):
    """Ends the sweep: when its GPU hours are used, too many trials failed, on a signal, or on an error.

    Args:
        plan: The sweep.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._began = time.monotonic()
        self._worker_seconds = sum(trial.worker_seconds for trial in read_trials(plan.storage))
        self._seconds_before = seconds_before(plan.storage)
        self._running: dict[str, tuple[float, float]] = {}  # worker seconds, and when they were told
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
        """GPU hours over all attempts, of workers where there are no GPUs."""
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
        """No trial alone."""
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
        """Count its workers' time; the first report comes with their start."""
        self._has_begun = True
        if result["error"]:
            self.fail(UnavailableError(*result["error"]))
        self._running[trial.trial_id] = (result["worker_seconds"], time.monotonic())

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Count failures in a row."""
        self._worker_seconds += self._running.pop(trial.trial_id, (0.0, 0.0))[0]
        ended = add_attempt({}, trial)
        self._failures = self._failures + 1 if ended.status == "failed" else 0
        if self._failures >= self._plan.space.sweep.failures_in_a_row:
            self.gave_up = f"{self._failures} trials failed one after another, the last: {ended.reason}"

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its process died more often than it is started again."""
        self.on_trial_complete(iteration, trials, trial)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its process died and is started again, and counts its workers' time from 0."""
        self._worker_seconds += self._running.pop(trial.trial_id, (0.0, 0.0))[0]

    def __getstate__(self) -> dict[str, Any]:
        return {}


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
