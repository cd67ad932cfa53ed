"""Catastrophic overfitting: single-step training that suddenly resists only its own attack.

Wong et al. 2020 found it in FGSM training and detect it with PGD; de Jorge et al. 2022 delay it with noise.
"""

from collections.abc import Mapping, Sequence

from tla_service.config import RunConfig

ROBUST = "validation/robust_accuracy"
COLLAPSED = "collapsed"


def has_collapsed(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether an epoch was marked; a resumed run knows from it, too."""
    return any(COLLAPSED in epoch for epoch in history)


def collapses(metrics: Mapping[str, float], best: Mapping[str, float], config: RunConfig) -> bool:
    """Whether an epoch's robust accuracy on the validation split fell too far below that of the best epoch."""
    attack = config.attack
    watched = config.method != "natural" and attack.is_single_step and attack.on_collapse != "ignore"
    return watched and metrics[ROBUST] < (1 - attack.collapse_drop) * best[ROBUST]


def message(metrics: Mapping[str, float], best: Mapping[str, float], config: RunConfig) -> str:
    """Message about a collapse."""
    act = {"stop": "the run ends with the best weights", "pgd": "continuing from the best weights with PGD"}
    return (
        f"single-step training collapsed in epoch {metrics['epoch']:.0f}: robust accuracy on validation "
        f"{metrics[ROBUST]:.1%}, before {best[ROBUST]:.1%}; {act[config.attack.on_collapse]}"
    )
