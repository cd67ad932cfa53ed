"""What to try next: a function of space, seed, number and the trials before it; nothing else is kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tla_service.tuning.axes import Axis
from tla_service.tuning.space import Point, Space
from tla_service.tuning.trial import Trial

if TYPE_CHECKING:
    import optuna

_ASKS = 30  # points that tpe may offer in vain before one is drawn at random


def propose(space: Space, number: int, trials: Sequence[Trial]) -> Point | None:
    """The point of a new trial; None when a grid is used up.

    Args:
        space: What is searched, and how.
        number: The trial's number.
        trials: All trials so far.
    """
    sweep = space.sweep
    if sweep.searcher == "grid":
        points = space.grid()
        return points[number] if number < len(points) else None
    if number == 0 and sweep.own_first and (own := space.own_point()) is not None:
        return own
    if sweep.searcher == "tpe" and number >= sweep.startup_trials:
        for attempt in range(_ASKS):
            point = _ask(space, trials, seed=_seed(sweep.seed, number, attempt))
            if space.allows(point):
                return point
    return space.random(np.random.default_rng([sweep.seed, number]))


def study_of(
    space: Space,
    trials: Sequence[Trial],
    sampler: "optuna.samplers.BaseSampler | None" = None,
    *,
    as_finished: bool = False,
) -> Any:
    """The trials as an Optuna study.

    Args:
        space: What is searched.
        trials: The trials.
        sampler: What asks for more.
        as_finished: Take all for finished; else failed and stopped ones rank below those that did.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["maximize"] * len(space.sweep.objectives), sampler=sampler)
    distributions = {axis.name: _distribution(axis) for axis in space.axes}
    for trial in trials:
        study.add_trial(_frozen(trial, space, distributions, as_finished=as_finished))
    return study


def _ask(space: Space, trials: Sequence[Trial], seed: int) -> Point:
    import optuna

    # Trials under way count as bad for the time being, so that several at once do not try the same.
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
    study = study_of(space, trials, sampler)
    asked = study.ask({axis.name: _distribution(axis) for axis in space.axes})
    return {axis.name: _value(axis, asked.params[axis.name]) for axis in space.axes}


def _frozen(trial: Trial, space: Space, distributions: dict[str, Any], *, as_finished: bool) -> Any:
    import optuna

    states = optuna.trial.TrialState
    values = [trial.value(objective) for objective in space.sweep.objectives]
    known = [value for value in values if value is not None]
    single = len(values) == 1
    state = {"running": states.RUNNING, "finished": states.COMPLETE, "stopped": states.PRUNED, "failed": states.PRUNED}
    chosen = states.COMPLETE if as_finished else state[trial.status]
    if chosen == states.PRUNED and not single:
        chosen = states.COMPLETE  # Optuna prunes for one objective only
        known = known if trial.status == "stopped" else [0.0] * len(values)
    reports = {trial.epochs_done: known[0]} if single and known and trial.status != "failed" else {}
    return optuna.trial.create_trial(
        state=chosen,
        params={axis.name: _param(axis, trial.point[axis.name]) for axis in space.axes},
        distributions=distributions,
        values=known if chosen == states.COMPLETE else None,
        intermediate_values=reports,
    )


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.choices:
        return CategoricalDistribution([str(choice) for choice in axis.choices])
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _param(axis: Axis, value: Any) -> Any:
    return str(value) if axis.choices else value


def _value(axis: Axis, param: Any) -> Any:
    return next(choice for choice in axis.choices if str(choice) == param) if axis.choices else param


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
