"""Which settings the outcome of a sweep depends on."""

from collections.abc import Sequence

import numpy as np

from tla_service.tuning.search import study_of
from tla_service.tuning.space import Space
from tla_service.tuning.trial import Trial

FEWEST_TRIALS = 4
_REPETITIONS = 5


def importances(trials: Sequence[Trial], space: Space) -> dict[str, tuple[float, float]]:
    """Each setting's share of the first objective's variation, by fANOVA (Hutter et al. 2014).

    Trials that were stopped early count with the best they had reached. Repetitions of the random forest behind the
    estimate show how far it can be trusted.

    Args:
        trials: Those with a report.
        space: What was searched.

    Returns:
        Mean and standard deviation over repetitions by setting; empty if there is too little to tell.
    """
    values = {trial.value(space.sweep.objectives[0]) for trial in trials}
    if len(trials) < FEWEST_TRIALS or len(values) < 2 or len(space.axes) < 2:
        return {}
    import optuna

    study = study_of(space, trials, as_finished=True)
    shares: dict[str, list[float]] = {axis.name: [] for axis in space.axes}
    for seed in range(_REPETITIONS):
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        try:
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=lambda trial: trial.values[0]
            )
        except RuntimeError:  # it finds no variation to explain
            return {}
        for name, share in found.items():
            shares[name].append(share)
    return {name: (float(np.mean(each)), float(np.std(each))) for name, each in shares.items() if each}
