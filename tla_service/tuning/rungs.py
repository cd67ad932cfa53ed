"""Asynchronous successive halving (Li et al. 2020) as a function of what trials reported: no state to lose."""

from collections.abc import Sequence

import numpy as np

from tla_service.tuning.trial import Trial


def milestones(grace_epochs: int, reduction_factor: float, epochs: int) -> list[float]:
    """Epochs at which trials are compared: the grace period, then each time the factor longer, below a full trial."""
    found = [float(grace_epochs)]
    while found[-1] * reduction_factor < epochs:
        found.append(found[-1] * reduction_factor)
    return [milestone for milestone in found if milestone < epochs]


def rung_reached(trial: Trial, rungs: Sequence[float]) -> float | None:
    """The milestone that the trial's last report was the first to reach; None if it reached none."""
    before = int(trial.reports[-2]["epoch"]) + 1 if len(trial.reports) > 1 else 0
    return max((milestone for milestone in rungs if before < milestone <= trial.epochs_done), default=None)


def is_behind(trial: Trial, trials: Sequence[Trial], milestone: float, objective: str, reduction_factor: float) -> bool:
    """Whether a trial that has just reached a milestone belongs to those that are stopped there.

    It does if its best value so far is below the (1 - 1/factor) quantile of the others' values at the same milestone.

    Args:
        trial: The trial.
        trials: All trials; those that have not come so far do not count.
        milestone: Epochs.
        objective: Validation accuracy to compare by.
        reduction_factor: One in this many goes on.
    """
    others = [
        value
        for other in trials
        if other.number != trial.number and (value := _value_at(other, milestone, objective)) is not None
    ]
    own = trial.value(objective)
    if not others or own is None:
        return False
    return bool(own < np.percentile(others, 100 * (1 - 1 / reduction_factor)))


def _value_at(trial: Trial, milestone: float, objective: str) -> float | None:
    """The best value up to the first report at or after the milestone."""
    first = next((report["epoch"] + 1 for report in trial.reports if report["epoch"] + 1 >= milestone), None)
    return None if first is None else trial.value(objective, first)
