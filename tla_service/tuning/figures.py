"""Pictures of a sweep: what the trials tried, what mattered, and what they reached.

Shades are those of cividis, which reads the same with and without colour vision; marks differ in shape too.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tla_service.evaluation.figures import _BLACK, _BLUE, _GREEN, _ORANGE, _PURPLE, _figure, _percent, _save
from tla_service.tuning.axes import Axis
from tla_service.tuning.importance import importances
from tla_service.tuning.space import Space
from tla_service.tuning.studies import study_figure
from tla_service.tuning.trial import Trial, winner

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SYMBOLS = {
    "loss.triplet_weight": "λ₁ triplet weight",
    "loss.norm_weight": "λ₂ norm weight",
    "loss.margin": "α margin",  # noqa: RUF001
    "training.global_batch_size": "batch size",
    "mining.pool_size": "pool size",
    "optimizer.learning_rate": "learning rate",
}
_MARKS: dict[str, dict[str, Any]] = {
    "finished": {"marker": "o", "facecolors": _BLUE, "edgecolors": _BLUE},
    "stopped": {"marker": "s", "facecolors": "none", "edgecolors": _ORANGE},
    "running": {"marker": "D", "facecolors": "none", "edgecolors": _GREEN},
}
_WORDS = {"finished": "finished", "stopped": "stopped early", "running": "under way"}
_CHOICES_IN_FULL = 12


def draw_all(trials: Sequence[Trial], space: Space, folder: Path) -> list[Path]:
    """Draw what these trials have to show.

    Args:
        trials: All trials.
        space: What was searched.
        folder: Where to; made if it is missing.

    Returns:
        The PNG files.
    """
    objective = space.sweep.objectives[0]
    measured = [trial for trial in trials if trial.reports]
    paths: list[Path] = []
    if measured:
        paths.append(folder / "parallel_coordinates.png")
        parallel_coordinates(trials, space, objective, paths[-1])
        paths.append(folder / "clean_and_robust.png")
        pareto(measured, objective, paths[-1])
    found = importances(measured, space)
    if found:
        paths.append(folder / "importance.png")
        importance_bars(found, len(measured), objective, paths[-1])
    if space.sweep.picture:
        path = folder / f"{space.sweep.picture}.png"
        if study_figure(measured, space, path):
            paths.append(path)
    return paths


def parallel_coordinates(trials: Sequence[Trial], space: Space, objective: str, path: Path) -> None:
    """Draw a line a trial through its values, ending at what it reached; the winner's in bold.

    Args:
        trials: All trials; one that failed before its first validation ends in a cross below the last axis.
        space: What was searched: an axis each, in the order given.
        objective: Validation accuracy of the last axis.
        path: PNG file to write; its folder is made.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    axes_count = len(space.axes) + 1
    figure = _figure(2.2 + 1.7 * axes_count, 4.2)
    axes = figure.subplots()
    reached = [value for trial in trials if (value := trial.value(objective)) is not None]
    low, high = min(reached), max(reached)
    room = max(0.02, 0.05 * (high - low))
    low, high = low - room, high + room
    shade, scale = colormaps["cividis"], Normalize(min(reached), max(*reached, min(reached) + 1e-6))
    best = winner(trials, objective)
    for trial in sorted(trials, key=lambda trial: trial.value(objective) or -1.0):
        value = trial.value(objective)
        heights = [_height(axis, trial.point[axis.name]) for axis in space.axes]
        if value is None and trial.status != "failed":
            continue  # it has not come to its first validation yet
        if value is None:
            axes.plot([*range(axes_count)], [*heights, -0.08], color="#999999", linestyle=":", linewidth=1)
            axes.plot([axes_count - 1], [-0.08], marker="x", color="#999999", clip_on=False)
            continue
        heights.append((value - low) / (high - low))
        style = "-" if trial.status == "finished" else "--"
        if trial is best:
            axes.plot(heights, color=_BLACK, linewidth=5.5, solid_capstyle="round", zorder=4)
        axes.plot(heights, color=shade(scale(value)), linestyle=style, linewidth=3 if trial is best else 1.8, zorder=5)
    for place, axis in enumerate(space.axes):
        _scale(axes, place, [(_height(axis, value), _short(value)) for value in _ticks(axis)])
    _scale(axes, axes_count - 1, [((v - low) / (high - low), f"{v:.1%}") for v in _round_ticks(low, high)])
    names = [_SYMBOLS.get(axis.name, axis.name) for axis in space.axes]
    axes.set_xticks(range(axes_count), [*names, f"validation\n{objective.replace('_', ' ')}"])
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.25, axes_count - 0.6)
    axes.set_ylim(-0.1, 1.05)
    axes.spines[:].set_visible(False)
    axes.set_title("Trials: solid to the end, dashed stopped early, dotted failed; the best outlined", fontsize=10)
    _save(figure, path)


def pareto(trials: Sequence[Trial], objective: str, path: Path) -> None:
    """Draw clean against robust validation accuracy, a mark a trial, with the front of those that none beats in both.

    Args:
        trials: Those with a report.
        objective: What the winner is chosen by.
        path: PNG file to write; its folder is made.
    """
    figure = _figure(5.4, 4.2)
    axes = figure.subplots()
    for status, mark in _MARKS.items():
        points = [_accuracies(trial) for trial in trials if trial.status == status]
        if points:
            clean, robust = zip(*points, strict=True)
            axes.scatter(clean, robust, label=f"{_WORDS[status]} ({len(points)})", s=42, linewidths=1.5, **mark)
    front = pareto_front([_accuracies(trial) for trial in trials])
    axes.step(
        *zip(*front, strict=True), where="pre", color=_BLACK, linewidth=1, linestyle="--", label="front", zorder=0
    )
    best = winner(trials, objective)
    if best is not None:
        style: dict[str, Any] = {
            "color": _PURPLE,
            "markerfacecolor": "none",
            "markeredgewidth": 1.6,
            "linestyle": "none",
        }
        here = _accuracies(best)
        axes.plot(*here, marker="*", markersize=18, label=f"best: trial {best.number}", zorder=5, **style)
    axes.set_xlabel("validation clean accuracy [%]")
    axes.set_ylabel("validation robust accuracy [%]")
    for side in (axes.xaxis, axes.yaxis):
        side.set_major_formatter(_percent())
    axes.margins(0.12)
    _frame(axes)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def importance_bars(found: dict[str, tuple[float, float]], trials: int, objective: str, path: Path) -> None:
    """Draw each setting's share of the objective's variation, with the spread over repetitions of the estimate.

    Args:
        found: By setting, mean and standard deviation of its share.
        trials: How many trials that is from.
        objective: What varied.
        path: PNG file to write; its folder is made.
    """
    names = sorted(found, key=lambda name: found[name][0])
    figure = _figure(6.4, 1.5 + 0.42 * len(names))
    axes = figure.subplots()
    shares, spreads = zip(*(found[name] for name in names), strict=True)
    axes.barh(range(len(names)), shares, xerr=spreads, color=_BLUE, height=0.62, ecolor=_BLACK, capsize=3)
    axes.set_yticks(range(len(names)), [_SYMBOLS.get(name, name) for name in names])
    axes.set_xlim(0, None)
    axes.xaxis.set_major_formatter(_percent())
    axes.set_xlabel(f"share of the variation of {objective.replace('_', ' ')} [%]")
    few = "\ntoo few to rank settings by" if trials < 10 * len(names) else ""
    axes.set_title(f"What mattered (fANOVA over {trials} trials){few}", fontsize=10)
    _frame(axes)
    _save(figure, path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in one coordinate and equals in the other, by the first coordinate."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def _accuracies(trial: Trial) -> tuple[float, float]:
    best = trial.best()
    assert best is not None
    return best["validation/clean_accuracy"], best["validation/robust_accuracy"]


def _height(axis: Axis, value: Any) -> float:
    """Where a value lies on its axis, from 0 to 1."""
    if axis.choices:
        return (axis.choices.index(value) + 0.5) / len(axis.choices)
    low, high, here = (math.log(v) if axis.log else float(v) for v in (axis.low, axis.high, value))
    return (here - low) / (high - low)


def _ticks(axis: Axis) -> list[Any]:
    if axis.choices:
        step = math.ceil(len(axis.choices) / _CHOICES_IN_FULL)
        return list(axis.choices[::step])
    if not axis.log:
        return [axis.low, *_round_ticks(axis.low, axis.high)[1:-1], axis.high]
    decades = range(math.ceil(math.log10(axis.low) - 1e-9), math.floor(math.log10(axis.high) + 1e-9) + 1)
    return sorted({axis.low, axis.high, *(10.0**power for power in decades)})


def _round_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def _scale(axes: "Axes", place: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(place, ymin=0.1 / 1.15, ymax=1.1 / 1.15, color="#555555", linewidth=1, zorder=1)
    for height, text in ticks:
        axes.plot([place - 0.02, place + 0.02], [height, height], color="#555555", linewidth=1, zorder=1)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
        axes.text(place + 0.04, height, text, fontsize=8, va="center", bbox=box, zorder=6)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _frame(axes: "Axes") -> None:
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
