"""Pictures of the measures: accuracy, ROC curves, t-SNE, shift ratios (Mao et al. 2019, Figs. 1, 2, 5).

Marks, hatches or line styles repeat what colours say, for colour-blind readers and grey print.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tla_service.evaluation import figures as fg
from tla_service.evaluation.detection import RocCurve
from tla_service.evaluation.geometry import Projection, ShiftRatios, mean_of
from tla_service.evaluation.results import Accuracy, Curve, Share
from tla_service.inference.detector import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_YELLOW, _SKY, _PINK = "#E69F00", "#56B4E9", "#CC79A7"
_MARKS = list(zip((fg.BLUE, fg.ORANGE, fg.GREEN, _YELLOW, _SKY, _PINK, fg.BLACK, fg.PURPLE), "o^sDvpXh", strict=True))
_BARS = ((fg.BLUE, ""), (fg.ORANGE, "//"), (fg.GREEN, ".."), (_YELLOW, "xx"), (_SKY, "\\\\"), (_PINK, "++"))
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": fg.ORANGE, "linestyle": "-", "marker": "o"},
    {"color": fg.BLUE, "linestyle": "--", "marker": "s"},
    {"color": fg.GREEN, "linestyle": "-.", "marker": "^"},
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
    """Draw accuracy along one axis, a line per curve (by name, three at most), with 95% intervals as bands.

    Steps are drawn on a logarithmic axis that also shows zero, the clean accuracy. `marked` is a place on the axis,
    such as the radius trained for, and its name.
    """
    axes: Any = fg.new_figure(5.6, 3.8).subplots()
    for (name, curve), style in zip(curves.items(), _STYLES, strict=False):
        low, high = [point.low for point in curve.accuracy], [point.high for point in curve.accuracy]
        axes.fill_between(curve.x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        estimates = [_or_nan(point) for point in curve.accuracy]
        axes.plot(curve.x, estimates, label=name, linewidth=1.6, markersize=4.5, **style)
    if marked is not None:
        axes.axvline(marked[0], color=fg.PURPLE, linewidth=1, linestyle=(0, (1, 2)), zorder=0, label=marked[1])
    _scale(axes, next(iter(curves.values())).axis, sorted({x for curve in curves.values() for x in curve.x}))
    axes.set(ylim=(-0.02, 1.02), ylabel="accuracy [%], band: 95% interval")
    axes.yaxis.set_major_formatter(fg.PERCENT)
    fg.finish(axes, path)


def class_heat_map(accuracies: Mapping[str, Accuracy], class_names: Sequence[str], path: Path) -> None:
    """Draw accuracy by class (rows; weakest under the last attack on top, all of them last) and attack (columns)."""
    order = np.argsort([_or_nan(share) for share in list(accuracies.values())[-1].per_class], kind="stable")  # NaN last
    table = [[_or_nan(result.per_class[k]) for result in accuracies.values()] for k in order]
    readable = len(class_names) <= _READABLE_CLASSES
    # Among many classes a single row could not be seen.
    whole = 1 if readable else 1 + len(class_names) // _READABLE_CLASSES
    table += [[_or_nan(result) for result in accuracies.values()]] * whole
    height = 1.5 + (0.27 * len(table) if readable else 5.0)
    axes: Any = fg.new_figure(max(4.2, 1.6 + 0.62 * len(accuracies)), height).subplots()
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
    axes.figure.colorbar(picture, ax=axes, format=fg.PERCENT, label="accuracy [%]", fraction=0.06, pad=0.02)
    fg.save(axes.figure, path)


def roc_curves(results: Mapping[str, RocCurve], path: Path) -> None:
    """Draw the ROC curve of every score, with AUC and 95% interval, or why it is undefined, in the legend (Fig. 5)."""
    axes: Any = fg.new_figure(5.0, 5.4).subplots()
    axes.plot([0, 1], [0, 1], color=fg.GREY, linewidth=1, linestyle=(0, (2, 2)), label="chance")
    for place, (name, result) in enumerate(results.items()):
        score = result.score
        if score.auc is None:
            axes.plot([], [], linestyle="none", label=f"{name}: no AUC, {score.reason.partition(':')[0]}")
            continue
        label = f"{name}: AUC {score.auc:.3f} [{score.low:.3f}, {score.high:.3f}]"
        style = _STYLES[place % len(_STYLES)] | {"marker": None, "label": label}
        axes.plot(result.false_accepts, result.true_accepts, linewidth=1.8, **style)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="misclassified images accepted", ylabel="correctly classified images accepted")
    axes.xaxis.set_major_formatter(fg.PERCENT)
    axes.yaxis.set_major_formatter(fg.PERCENT)
    first = next(iter(results.values()))
    axes.set_title(f"Misclassified images\n{first.num_correct} correct, {first.num_wrong} misclassified", fontsize=11)
    fg.plain(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=8.5, handlelength=3.2)
    fg.save(axes.figure, path)


def risk_curves(risks: Mapping[str, Floats], path: Path) -> None:
    """Draw the share misclassified among the N images of the highest scores against N, by attack."""
    axes: Any = fg.new_figure(5.0, 4.4).subplots()
    for place, (name, risk) in enumerate(risks.items()):
        style = _STYLES[place % len(_STYLES)] | {"marker": None, "label": f"{name}: area {100 * risk.mean():.1f}%"}
        axes.plot(np.arange(1, len(risk) + 1) / len(risk), risk, linewidth=1.8, **style)
    axes.set(xlim=(0, 1.01), ylim=(0, None), xlabel="images accepted", ylabel="misclassified among the accepted")
    axes.xaxis.set_major_formatter(fg.PERCENT)
    axes.yaxis.set_major_formatter(fg.PERCENT)
    fg.plain(axes)
    axes.legend(frameon=False, fontsize=8.5, handlelength=3.2)
    fg.save(axes.figure, path)


def class_map(projection: Projection, class_names: Sequence[str], path: Path) -> None:
    """Draw one class in the plane: natural images grey, attacked ones by their predicted class (Fig. 1)."""
    axes: Any = fg.new_figure(6.8, 4.4).subplots()
    truth = int(projection.labels[0])
    name = class_names[truth]
    _dots(axes, projection.natural, f"natural {name}", (fg.GREY, "o"), 14, alpha=0.7, linewidths=0)
    said = projection.predictions
    classes, counts = np.unique(said, return_counts=True)
    # The commonest predictions get a mark of their own; what remains shares the last one.
    ranked = classes[np.argsort(-counts, kind="stable")]
    own = ranked if len(ranked) <= len(_MARKS) else ranked[: len(_MARKS) - 1]
    groups = [
        ("attacked, taken for " + class_names[klass] + (" (right)" if klass == truth else ""), said == klass)
        for klass in own
    ]
    if len(own) < len(ranked):
        groups.append((f"attacked, {len(ranked) - len(own)} other classes", ~np.isin(said, own)))
    style = {"alpha": 0.85, "edgecolors": "white", "linewidths": 0.4}
    for (label, members), mark in zip(groups, _MARKS, strict=False):
        _dots(axes, projection.adversarial[members], label, mark, 30, **style)
    _finish_map(axes, f"True class {name}: natural and attacked images")
    fg.save(axes.figure, path)


def pair_map(projection: Projection, source: int, target: int, class_names: Sequence[str], path: Path) -> None:
    """Draw two classes in the plane, and attacked images of `source` that are predicted as `target` (Fig. 2)."""
    axes: Any = fg.new_figure(6.8, 4.4).subplots()
    for klass, mark in ((source, _MARKS[0]), (target, _MARKS[2])):
        members = projection.labels == klass
        points = projection.natural[members]
        _dots(axes, points, f"natural {class_names[klass]}", mark, 18, alpha=0.75, linewidths=0)
    label = f"attacked {class_names[source]},\ntaken for {class_names[target]}"
    _dots(axes, projection.adversarial, label, _MARKS[1], 34, edgecolors=fg.BLACK, linewidths=0.5)
    _finish_map(axes, f"{class_names[source]} attacked into {class_names[target]}")
    fg.save(axes.figure, path)


def shift_bars(ratios: Mapping[str, ShiftRatios], path: Path) -> None:
    """Draw r and r' as bars, one per model or attack (Tables 2 and 3), with each class as a dot."""
    figure = fg.new_figure(7.0, 3.6)
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "r: misclassified as the class (higher is better)", [x.r for x in ratios.values()]),
        (right, "r': crafted from it (lower is better)", [x.r_prime for x in ratios.values()]),
    )
    for axes, title, values in panels:
        tallest = max([1.0, *(found for of_class in values for found in of_class if not np.isnan(found))])
        for place, of_class in enumerate(values):
            found = of_class[~np.isnan(of_class)]
            mean = mean_of(of_class)
            missing = f"\nclasses left out: {len(of_class) - len(found)}" if len(found) < len(of_class) else ""
            text = "undefined" if mean is None else f"{mean:.3f}{missing}"
            axes.text(place, 1.04 * tallest, text, ha="center", va="bottom", fontsize=9)
            if mean is not None:
                colour, hatch = _BARS[place % len(_BARS)]
                style = {"width": 0.62, "edgecolor": "white", "linewidth": 0, "alpha": 0.85}
                axes.bar(place, mean, color=colour, hatch=hatch, **style)
                spread = place + np.linspace(-0.2, 0.2, len(found))
                axes.scatter(spread, found, s=11, color="white", edgecolors=fg.BLACK, linewidths=0.7, zorder=3)
        axes.axhline(1, color=fg.BLACK, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.set(xlim=(-0.6, len(values) - 0.4), ylim=(0, 1.22 * tallest))
        axes.set_xticks(range(len(values)), list(ratios), rotation=30 if len(ratios) > 4 else 0)
        axes.set_title(title, fontsize=10)
        fg.plain(axes, grid="y")
    figure.supxlabel(
        "bars: mean over classes; dots: single classes; dashed line: as far as natural images", fontsize=8.5
    )
    left.set_ylabel("distance to natural images ÷ their own")
    fg.save(figure, path)


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


def _dots(axes: "Axes", points: Floats, label: str, mark: tuple[str, str], size: float, **style: Any) -> None:
    colour, marker = mark
    label = f"{label} ({len(points)})"
    axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, marker=marker, label=label, **style)


def _finish_map(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel("t-SNE, first axis (no unit)", fontsize=9)
    axes.set_ylabel("second axis", fontsize=9)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)
