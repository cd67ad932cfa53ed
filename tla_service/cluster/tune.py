"""A sweep's trials on Ray Tune: OptunaSearch suggests, ASHA stops, and each attempt starts from what earlier ones know.

An attempt is a Tune experiment of its own (`tune-001`, `tune-002`, ...). `Tuner.restore` would lose ASHA's rungs and
could change neither the number of trials nor the budget (ray/tune/search/search_generator.py, tune_controller.py).
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
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

from tla_service.cluster.attempts import Budget, Plan, Snapshots, attempts, read_trials, run_trial
from tla_service.cluster.placement import TRIAL_PROCESS_BYTES
from tla_service.tuning.space import Space, key_of
from tla_service.tuning.trials import STUDY, Trial, best_of, distributions, sampler_of, study_of, to_params, to_point

DEFAULT_SAMPLES = 16
PROCESS_RESTARTS = 3
_ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the snapshot and MLflow have it all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the budget handles signals
}
_ASKS = 100  # suggestions that may be refused before a point is drawn at random


def run_trials(plan: Plan, budget: Budget, log: tune.Callback, *, debug: bool = False) -> None:
    """Run the trials that are left, in a new attempt; `debug` shows Ray Tune's own tables."""
    space, sweep = plan.space, plan.space.sweep
    before = read_trials(plan.storage)
    repeated = ("running", "failed", "finished") if plan.repeat else ("running",)
    ended = [trial for trial in before if trial.status not in repeated]
    grid: list[dict[str, Any]] = []
    if sweep.searcher == "grid":
        known = {key_of(trial.point): trial for trial in before}
        new = itertools.count(max((trial.number for trial in before), default=-1) + 1)
        for point in space.grid()[: sweep.num_samples]:
            trial = known.get(key_of(point))
            if trial is None or trial.status in repeated:
                # A finished one trains in a new folder: that of before has a result, but no checkpoint.
                number = next(new) if trial is None or trial.status == "finished" else trial.number
                grid.append({"number": number, "point": point})
    num_left = len(grid) if sweep.searcher == "grid" else (sweep.num_samples or DEFAULT_SAMPLES) - len(ended)
    if num_left <= 0 or budget.stop_all():
        return
    os.environ.update(_ENVIRONMENT)
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "1" if debug else "0"  # the log has them in a line
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables; --debug shows them
    number = max((int(name.removeprefix("tune-")) for name in attempts(plan.storage)), default=0) + 1
    attempt = f"tune-{number:03d}"
    tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, plan=plan), {"memory": TRIAL_PROCESS_BYTES}),
        param_space={"trial": tune.grid_search(grid)} if grid else None,
        tune_config=tune.TuneConfig(
            search_alg=None if grid else Search(space, before),
            scheduler=scheduler(space, before, plan.epochs),
            num_samples=1 if grid else num_left,
            max_concurrent_trials=plan.max_concurrent,
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
    """Ray Tune's name of a trial; its snapshots refer to this function by its module."""
    return f"trial-{trial.config['trial']['number']:04d}-{trial.trial_id}"


class Search(OptunaSearch):
    """OptunaSearch that first repeats what earlier attempts left unfinished, and refuses what was tried or is wrong."""

    def __init__(self, space: Space, before: Sequence[Trial]) -> None:
        ended = [trial for trial in before if trial.status != "running"]
        running = [trial for trial in before if trial.status == "running"]
        first = [trial.point for trial in running]
        own = space.own_point() if space.sweep.own_first else None
        if own is not None and own not in [trial.point for trial in before]:
            first.append(own)
        storage, objectives = InMemoryStorage(), [*map(str, space.objectives)]
        study_of(space, ended, space.objectives, storage)
        super().__init__(
            space=distributions(space),
            metric=objectives,  # of a list Optuna learns when a trial ends; until then ASHA compares
            mode=["max"] * len(objectives),
            points_to_evaluate=[to_params(space, point) for point in first],
            sampler=sampler_of(space, len(before)),
            study_name=STUDY,
            storage=storage,
        )
        self._where = space
        self._tried = {key_of(trial.point) for trial in ended}
        self._numbers = {key_of(trial.point): trial.number for trial in running}
        self._next = max((trial.number for trial in before), default=-1) + 1

    def suggest(self, trial_id: str) -> Any:
        """The next trial; `Searcher.FINISHED` if the space has no other point."""
        study: Any = self._ot_study
        for ask in range(_ASKS + 1):
            if ask == _ASKS:
                rng = np.random.default_rng([self._where.sweep.seed, self._next])
                point = self._where.random(rng, self._tried)
                if point is None:
                    break
                study.enqueue_trial(to_params(self._where, point))
            super().suggest(trial_id)  # what it returns is nested where a name has a slash
            point = to_point(self._where, self._ot_trials[trial_id].params)
            key = key_of(point)
            if key in self._numbers or (key not in self._tried and self._where.allows(point)):
                self._tried.add(key)
                number = self._numbers.pop(key, self._next)
                self._next = max(self._next, number + 1)
                return {"trial": {"number": number, "point": point}}
            study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
        return Searcher.FINISHED


class _Scheduler(ASHAScheduler):
    """ASHA that knows of a trial's epochs in earlier attempts, which it would else record at a later rung."""

    known: Mapping[int, Sequence[dict[str, float]]]  # results by the trial's number

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record the result, and decide; a trial at its end is not stopped."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        return self.CONTINUE if result["epochs"] >= result["total_epochs"] else decision

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Fill the rungs that the trial has passed."""
        super().on_trial_add(tune_controller, trial)
        for result in self.known.get(trial.config["trial"]["number"], ()):
            super().on_trial_result(tune_controller, trial, result)


def _results(trial: Trial, objective: str) -> Iterator[dict[str, float]]:
    """What the trial reported: its best score so far, after each validation."""
    for index, score in enumerate(trial.curve):
        best = best_of(trial.curve[: index + 1], trial.selected_by)
        yield {"epochs": score.epochs, objective: getattr(best, objective)}


def scheduler(space: Space, before: Sequence[Trial], epochs: int) -> ASHAScheduler | None:
    """ASHA for trials of so many epochs, with rungs filled by earlier attempts; None if all run to their end."""
    sweep = space.sweep
    grace = sweep.grace_epochs or max(1, epochs // 9)
    if sweep.scheduler == "none" or grace >= epochs:
        return None
    objective = space.objectives[0]
    asha = _Scheduler("epochs", objective, "max", epochs - 1, grace, sweep.reduction_factor, stop_last_trials=False)
    asha.known = {trial.number: list(_results(trial, objective)) for trial in before}
    for trial in before:
        if trial.status != "running":  # those are added when they resume
            config = {"trial": {"number": trial.number}}
            asha.on_trial_add(None, SimpleNamespace(trial_id=f"earlier-{trial.number}", config=config))
    return asha
