"""Plots of a sweep: Optuna's own, and a study's beside the paper's."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tla_service.tuning.space import Space
from tla_service.tuning.studies import study_figure
from tla_service.tuning.study import study_of
from tla_service.tuning.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST_TRIALS = 4  # for importances


def draw_all(trials: Sequence[Trial], space: Space, folder: Path) -> list[Path]:
    """Plot the trials that have a validation and did not fail to PNG files in a folder; returns their paths."""
    from optuna.visualization import matplotlib as plots

    measured = [trial for trial in trials if trial.curve and trial.status != "failed"]
    if not measured:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    objective = space.sweep.objectives[0]
    target = f"validation {objective.replace('_', ' ')}"
    study = study_of(space, measured, [objective])
    both = study_of(space, measured, ["clean_accuracy", "robust_accuracy"])
    names, width = ["validation clean accuracy", "validation robust accuracy"], 3.0 + 1.8 * len(space.axes)
    parallel = folder / "parallel_coordinates.png"
    paths = [
        _save(lambda: plots.plot_parallel_coordinate(study, target_name=target), parallel, width),
        _save(lambda: plots.plot_pareto_front(both, target_names=names), folder / "clean_and_robust.png"),
    ]
    varies = len({trial.value(objective) for trial in measured}) > 1
    if varies and len(measured) >= FEWEST_TRIALS and len(space.axes) > 1:
        importance = folder / "importance.png"
        paths.append(_save(lambda: plots.plot_param_importances(study, target_name=target), importance))
    picture = folder / f"{space.sweep.picture}.png"
    if space.sweep.picture and study_figure(measured, space, picture):
        paths.append(picture)
    return paths


def _save(plot: "Callable[[], Axes]", path: Path, width: float = 6.4) -> Path:
    """Draw and write one plot, without changing the style of others."""
    from matplotlib import pyplot as plt
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings(), plt.rc_context({"backend": "agg"}):
        warnings.simplefilter("ignore", ExperimentalWarning)  # raised by all of Optuna's Matplotlib plots
        warnings.filterwarnings("ignore", "Attempting to set identical")  # an axis on which all trials agree
        plot()
        figure = plt.gcf()
        figure.set_size_inches(width, 4.8)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)
    return path
