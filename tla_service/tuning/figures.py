"""Plots of a sweep: Optuna's own; and for a study of the paper, its results on the left, ours on the right."""

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tla_service.evaluation.figures import BLUE, GREEN, ORANGE, legend, new_figure, plain, save
from tla_service.evaluation.paper import paper_figures
from tla_service.tuning.axes import shown
from tla_service.tuning.space import Space
from tla_service.tuning.trials import Trial, study_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST_TRIALS = 4  # for importances
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": ORANGE, "linestyle": "-", "marker": "o"},
    {"color": BLUE, "linestyle": "--", "marker": "s"},
    {"color": GREEN, "linestyle": "-.", "marker": "^"},
)


def draw_all(trials: Sequence[Trial], space: Space, folder: Path) -> list[Path]:
    """Plot the trials that have a validation and did not fail to PNG files in a folder; returns their paths."""
    from matplotlib import pyplot as plt
    from optuna.exceptions import ExperimentalWarning
    from optuna.visualization import matplotlib as plots

    measured = [trial for trial in trials if trial.curve and trial.status != "failed"]
    if not measured:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    objective = space.objectives[0]
    target = f"validation {objective.replace('_', ' ')}"
    study = study_of(space, measured, [objective])
    both = study_of(space, measured, ["clean_accuracy", "robust_accuracy"])
    names = ["validation clean accuracy", "validation robust accuracy"]
    drawn: dict[str, Callable[[], Axes]] = {
        "parallel_coordinates": lambda: plots.plot_parallel_coordinate(study, target_name=target),
        "clean_and_robust": lambda: plots.plot_pareto_front(both, target_names=names),
    }
    varies = len({trial.value(objective) for trial in measured}) > 1
    if varies and len(measured) >= FEWEST_TRIALS and len(space.axes) > 1:
        drawn["importance"] = lambda: plots.plot_param_importances(study, target_name=target)
    paths = []
    # Without changing the style of others' plots.
    with warnings.catch_warnings(), plt.rc_context({"backend": "agg"}):
        warnings.simplefilter("ignore", ExperimentalWarning)  # raised by all of Optuna's Matplotlib plots
        warnings.filterwarnings("ignore", "Attempting to set identical")  # an axis on which all trials agree
        for name, plot in drawn.items():
            plot()
            plt.gcf().set_size_inches(3.0 + 1.8 * len(space.axes) if name == "parallel_coordinates" else 6.4, 4.8)
            paths.append(folder / f"{name}.png")
            plt.savefig(paths[-1], dpi=150, bbox_inches="tight")
            plt.close()
    picture = folder / f"{space.sweep.picture}.png"
    if space.sweep.picture and _draw_study(measured, space, picture):
        paths.append(picture)
    return paths


def _draw_study(trials: Sequence[Trial], space: Space, path: Path) -> bool:
    """Draw the paper's results and ours side by side, each on its own scale of the same span; False without results.

    Ours are on the test set if the sweep measures it, else on the validation split: means over trials that differ in
    other settings (seeds), with their standard deviation. The first axis of the space is drawn along x.
    """
    from matplotlib.ticker import PercentFormatter

    study, axis, run = paper_figures()["studies"][space.sweep.picture], space.axes[0], space.run
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished:
        return False
    order = [shown(choice) for choice in axis.choices]
    figure = new_figure(10.4, 4.0)
    both = left, right = figure.subplots(1, 2)
    theirs = {name: {label: [value] for label, value in line.items()} for name, line in study["accuracies"].items()}
    _draw(left, theirs, order)
    _draw(right, _ours(finished, axis.name), order)
    left.set_title(study["source"], fontsize=10)
    seeds = max(sum(trial.point[axis.name] == choice for trial in finished) for choice in axis.choices)
    each = f"{seeds} trials each" if seeds > 1 else "one trial each"
    where = "test" if space.sweep.measure_test else "validation"
    right.set_title(f"ours: {run.data.name}, {run.model.name}, {where} set, {each}", fontsize=10)
    span = 1.15 * max(high - low for low, high in (axes.get_ylim() for axes in both))
    for axes in both:
        middle = sum(axes.get_ylim()) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))
        axes.set_xlabel(study["along"])
        axes.set_ylabel("accuracy under attack [%]")
    save(figure, path)
    return True


def _ours(trials: Sequence[Trial], axis: str) -> dict[str, dict[str, list[float]]]:
    """Accuracies by attack and value of the axis."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    prefix = "robust_accuracy/"
    for trial in trials:
        measured = {name.removeprefix(prefix): value for name, value in trial.test.items() if name.startswith(prefix)}
        if not measured and trial.best is not None:
            measured = {"validation attack": trial.best.robust_accuracy}
        for name, value in measured.items():
            values[name][shown(trial.point[axis])].append(value)
    return values


def _draw(axes: "Axes", lines: Mapping[str, Mapping[str, Sequence[float]]], order: Sequence[str]) -> None:
    """Means by label, with standard deviations where there are several values."""
    for (name, line), style in zip(lines.items(), _STYLES * len(lines), strict=False):
        values = {place: line[label] for place, label in enumerate(order) if label in line}
        means = [statistics.mean(each) for each in values.values()]
        spreads = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values.values()]
        errors = spreads if any(spreads) else None
        axes.errorbar(list(values), means, yerr=errors, label=name, linewidth=1.6, markersize=5, capsize=3, **style)
    axes.set_xticks(range(len(order)), order)
    axes.set_xlim(-0.3, len(order) - 0.7)
    plain(axes)
    legend(axes)
