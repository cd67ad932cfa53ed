"""Pictures of the suite: accuracy along radius, steps and restarts, and by class, with their intervals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tla_service.evaluation.figures import (
    _BLACK,
    _BLUE,
    _GREEN,
    _ORANGE,
    _PURPLE,
    _figure,
    _legend,
    _percent,
    _plain,
    _save,
)
from tla_service.evaluation.results import Accuracy, Curve, Share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": _ORANGE, "linestyle": "-", "marker": "o"},
    {"color": _BLUE, "linestyle": "--", "marker": "s"},
    {"color": _GREEN, "linestyle": "-.", "marker": "^"},
    {"color": _PURPLE, "linestyle": ":", "marker": "D"},
    {"color": _BLACK, "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
)
_AXES = {
    "epsilon": "radius ε of the perturbation",
    "steps": "gradient steps, all restarts together",
    "restarts": "random restarts",
    "l0": "values changed (L0 norm of the perturbation)",
    "l1": "sum of changes (L1 norm of the perturbation)",
}
_READABLE_CLASSES = 25  # more rows than this leave no room for names and figures in the cells


def accuracy_curves(curves: Mapping[str, Curve], path: Path, *, marked: tuple[float, str] | None = None) -> None:
    """Draw accuracy along one axis, a line per curve (one to five, by name), with 95% intervals as bands.

    Steps are drawn on a logarithmic axis that also shows zero, the clean accuracy. `marked` is a place on the axis,
    such as the radius trained for, and its name.
    """
    if not 1 <= len(curves) <= len(_STYLES):
        raise ValueError(f"{len(curves)} curves: give one to {len(_STYLES)}")
    axis = {curve.axis for curve in curves.values()}
    if len(axis) > 1:
        raise ValueError(f"curves along {', '.join(sorted(axis))}: draw one axis a figure")
    figure = _figure(5.6, 3.8)
    axes = figure.subplots()
    for (name, curve), style in zip(curves.items(), _STYLES, strict=False):
        low, high = [point.low for point in curve.accuracy], [point.high for point in curve.accuracy]
        axes.fill_between(curve.x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        estimates = [_or_nan(point) for point in curve.accuracy]
        axes.plot(curve.x, estimates, label=name, linewidth=1.6, markersize=4.5, **style)
    if marked is not None:
        axes.axvline(marked[0], color=_PURPLE, linewidth=1, linestyle=(0, (1, 2)), zorder=0, label=marked[1])
    _scale(axes, next(iter(axis)), sorted({x for curve in curves.values() for x in curve.x}))
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(_percent())
    axes.set_ylabel("accuracy [%], band: 95% interval")
    _plain(axes)
    _legend(axes)
    _save(figure, path)


def class_heat_map(accuracies: Mapping[str, Accuracy], class_names: Sequence[str], path: Path) -> None:
    """Draw accuracy by class (rows) and attack (columns) as shades of one colour, with the figure in each cell.

    The weakest class under the last attack is on top; the last row is all classes. With very many classes, names and
    figures are left out.
    """
    if not accuracies or any(len(result.per_class) != len(class_names) for result in accuracies.values()):
        raise ValueError(f"give at least one attack, each with {len(class_names)} classes")
    last = list(accuracies.values())[-1]
    order = sorted(range(len(class_names)), key=lambda k: _or_above(last.per_class[k]))
    table = [[_or_nan(result.per_class[k]) for result in accuracies.values()] for k in order]
    readable = len(class_names) <= _READABLE_CLASSES
    # Among many classes a single row could not be seen.
    whole = 1 if readable else 1 + len(class_names) // _READABLE_CLASSES
    table += [[_or_nan(result) for result in accuracies.values()]] * whole
    height = 1.5 + (0.27 * len(table) if readable else 5.0)
    figure = _figure(max(4.2, 1.6 + 0.62 * len(accuracies)), height)
    axes = figure.subplots()
    picture = axes.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.axhline(len(order) - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(accuracies)), list(accuracies), rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(labelsize=8.5, length=0)
    if readable:
        axes.set_yticks(range(len(table)), [*(class_names[k] for k in order), "all classes"])
        _write_cells(axes, table)
    else:
        axes.set_yticks([len(order) + (whole - 1) / 2], ["all classes"])
        axes.set_ylabel(f"{len(order)} classes, the weakest first")
    axes.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, format=_percent(), label="accuracy [%]", fraction=0.06, pad=0.02)
    _save(figure, path)


def class_bars(result: Accuracy, class_names: Sequence[str], path: Path) -> None:
    """Draw accuracy by class under one attack as bars with 95% intervals, the weakest first, and the whole as a line.

    A class without images is drawn empty.
    """
    if len(result.per_class) != len(class_names):
        raise ValueError(f"{len(result.per_class)} classes and {len(class_names)} names")
    order = sorted(range(len(class_names)), key=lambda k: _or_above(result.per_class[k]))
    shown = [result.per_class[k] for k in order]
    figure = _figure(min(16.0, max(4.2, 1.2 + 0.42 * len(order))), 3.6)
    axes = figure.subplots()
    heights = [share.estimate or 0.0 for share in shown]
    below = [height - share.low if share.images else 0.0 for height, share in zip(heights, shown, strict=True)]
    above = [share.high - height if share.images else 0.0 for height, share in zip(heights, shown, strict=True)]
    axes.bar(range(len(order)), heights, color=_BLUE, alpha=0.75, width=0.75)
    axes.errorbar(range(len(order)), heights, yerr=(below, above), fmt="none", ecolor=_BLACK, elinewidth=1, capsize=2.5)
    axes.axhspan(result.low, result.high, color=_ORANGE, alpha=0.18, linewidth=0)
    whole = _or_nan(result)
    axes.axhline(whole, color=_ORANGE, linewidth=1.4, label=f"all classes: {whole:.1%}")
    axes.set_xlim(-0.6, len(order) - 0.4)
    if len(order) <= _READABLE_CLASSES:
        longest = max(len(class_names[k]) for k in order)
        turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if longest > 3 else {}
        axes.set_xticks(range(len(order)), [class_names[k] for k in order], **turn)
    else:
        axes.set_xticks([])
    axes.set_xlabel("class, the weakest first")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(_percent())
    axes.set_ylabel("accuracy [%], with 95% interval")
    axes.spines[["top", "right"]].set_visible(False)
    # Above the bars: inside the axes it would cover some of them.
    axes.legend(edgecolor="none", facecolor="none", fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    _save(figure, path)


def _scale(axes: "Axes", axis: str, x: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xlabel(_AXES[axis])
    if axis in ("epsilon", "l0", "l1"):
        axes.set_xlim(left=0)
        return
    if axis == "restarts":
        every = max(1, round(x[-1] / 10 + 0.49))
        axes.xaxis.set_major_locator(FixedLocator([1.0, *(n for n in x if n % every == 0)]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        return
    # Zero steps, the clean images, has no place on a purely logarithmic axis.
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    # The last number of steps is what readers look for: it gets a tick, and room to its left.
    tens = [factor * 10.0**power for power in range(6) for factor in (1, 2, 5) if factor * 10.0**power <= x[-1] / 2.5]
    tens.append(x[-1])
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in (0.0, *tens) if x[0] <= tick <= x[-1]]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _write_cells(axes: "Axes", table: Sequence[Sequence[float]]) -> None:
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            # cividis is dark at the low end.
            colour = "white" if math.isnan(value) or value < 0.55 else "black"
            text = "-" if math.isnan(value) else f"{100 * value:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _or_nan(share: Share) -> float:
    return math.nan if share.estimate is None else share.estimate


def _or_above(share: Share) -> float:
    """Sorts what was not measured last."""
    return 2.0 if share.estimate is None else share.estimate
