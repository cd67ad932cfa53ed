"""A sweep as an Optuna study: for the searcher, and for Optuna's plots."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tla_service.tuning.settings import Objective
from tla_service.tuning.space import Point, Space
from tla_service.tuning.trials import Trial

if TYPE_CHECKING:
    import optuna

STUDY = "sweep"


def study_of(
    space: Space,
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    storage: "optuna.storages.BaseStorage | None" = None,
) -> "optuna.Study":
    """The trials as a study in which all are complete; one that failed, or has no validation, counts as 0."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    maximize = optuna.study.StudyDirection.MAXIMIZE
    study = optuna.create_study(directions=[maximize] * len(objectives), storage=storage, study_name=STUDY)
    axes = distributions(space)
    for trial in trials:
        values = [0.0 if trial.status == "failed" else trial.value(name) or 0.0 for name in objectives]
        params = to_params(space, trial.point)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=axes, values=values))
    return study


def sampler_of(space: Space, num_before: int) -> "optuna.samplers.BaseSampler":
    """Optuna's sampler; seeded by the number of trials before this attempt too, so that it draws other numbers."""
    import optuna

    seed = int(np.random.SeedSequence([space.sweep.seed, num_before]).generate_state(1)[0])
    if space.sweep.searcher == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # Running trials count as bad for the time being, so that parallel ones do not try the same.
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=space.sweep.startup_trials, multivariate=True, constant_liar=True
    )


def distributions(space: Space) -> "dict[str, optuna.distributions.BaseDistribution]":
    """Optuna's distribution of each axis."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for axis in space.axes:
        if axis.choices:
            found[axis.name] = CategoricalDistribution([_param(choice) for choice in axis.choices])
        else:
            found[axis.name] = (IntDistribution if axis.whole else FloatDistribution)(*axis.ends, log=axis.log)
    return found


def to_params(space: Space, point: Point) -> dict[str, Any]:
    """A point as Optuna's parameters."""
    return {axis.name: _param(point[axis.name]) for axis in space.axes}


def to_point(space: Space, params: dict[str, Any]) -> Point:
    """The point of Optuna's parameters."""
    return {
        axis.name: next((choice for choice in axis.choices if _param(choice) == params[axis.name]), params[axis.name])
        for axis in space.axes
    }


def _param(value: Any) -> Any:
    """A value as Optuna takes it: numbers and text as they are, lists and the like as text."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)
