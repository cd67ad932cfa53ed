"""Pictures of the measures: ROC curves, retrieval, t-SNE, shift ratios (Mao et al. 2019, Figs. 1, 2, 4, 5).

Marks, hatches or line styles repeat what colours say, for colour-blind readers and grey print.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tla_service.evaluation.detection import RocCurve
from tla_service.evaluation.figures import (
    _BLACK,
    _BLUE,
    _GREEN,
    _ORANGE,
    _PURPLE,
    _figure,
    _judge,
    _percent,
    _plain,
    _save,
    _show,
)
from tla_service.evaluation.geometry import Projection, ShiftRatios, mean_of
from tla_service.inference.detector import Floats, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_YELLOW, _SKY, _PINK, _GREY = "#E69F00", "#56B4E9", "#CC79A7", "#9A9A9A"
_CURVES = (
    (_BLUE, "-"),
    (_ORANGE, "--"),
    (_GREEN, "-."),
    (_PURPLE, (0, (1, 1))),
    (_YELLOW, (0, (5, 1, 1, 1, 1, 1))),
    (_SKY, (0, (8, 2))),
)
_MARKS = (
    (_BLUE, "o"),
    (_ORANGE, "^"),
    (_GREEN, "s"),
    (_YELLOW, "D"),
    (_SKY, "v"),
    (_PINK, "p"),
    (_BLACK, "X"),
    (_PURPLE, "h"),
)
_BARS = ((_BLUE, ""), (_ORANGE, "//"), (_GREEN, ".."), (_YELLOW, "xx"), (_SKY, "\\\\"), (_PINK, "++"))


class PanelRow(NamedTuple):
    """Queries (Q, C, H, W) in [0, 1], their nearest training images (Q, n, C, H, W), and their classes (Q, n)."""

    queries: Floats
    neighbours: Floats
    classes: Integers


def roc_curves(results: Mapping[str, RocCurve], path: Path) -> None:
    """Draw the ROC curve of every score, with AUC and 95% interval, or why it is undefined, in the legend (Fig. 5)."""
    _some(results, "results")
    figure = _figure(5.0, 5.4)
    axes: Axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (2, 2)), label="chance")
    for place, (name, result) in enumerate(results.items()):
        score = result.score
        if score.auc is None:
            axes.plot([], [], linestyle="none", label=f"{name}: no AUC, {score.reason.partition(':')[0]}")
            continue
        interval = "" if score.low is None else f" [{score.low:.3f}, {score.high:.3f}]"
        colour, dashes = _CURVES[place % len(_CURVES)]
        label = f"{name}: AUC {score.auc:.3f}{interval}"
        axes.plot(result.false_accepts, result.true_accepts, linewidth=1.8, label=label, color=colour, linestyle=dashes)
    axes.set_aspect("equal")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_xlabel("misclassified images accepted")
    axes.set_ylabel("correctly classified images accepted")
    axes.xaxis.set_major_formatter(_percent())
    axes.yaxis.set_major_formatter(_percent())
    first = next(iter(results.values()))
    axes.set_title(f"Misclassified images\n{first.num_correct} correct, {first.num_wrong} misclassified", fontsize=11)
    _plain(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=8.5, handlelength=3.2)
    _save(figure, path)


def retrieval_panel(labels: Integers, states: Mapping[str, PanelRow], class_names: Sequence[str], path: Path) -> None:
    """Draw a row per query and state (clean, attacked): it and its nearest training images (Fig. 4).

    A neighbour of the query's class (`labels`, (Q,)) has a solid blue frame and a tick, others a dashed orange frame
    and a cross. ValueError without queries, or if images do not fit them.
    """
    shapes = [(len(row.queries), *row.neighbours.shape[:2]) for row in states.values()]
    wanted = next(iter(states.values())).classes.shape
    if not len(labels) or set(shapes) != {(len(labels), *wanted)}:
        raise ValueError(f"images of leading shapes {shapes} for {wanted} neighbours of {len(labels)} queries")
    queries, count = wanted
    figure = _figure(1.35 * (count + 1) + 0.5, 0.35 + 1.5 * len(states) * queries)
    grid = figure.subplots(len(states) * queries, count + 1, squeeze=False)
    for query in range(queries):
        for offset, (state, row) in enumerate(states.items()):
            cells = grid[len(states) * query + offset]
            _show(cells[0], row.queries[query])
            cells[0].set_ylabel(state, fontsize=9, fontweight="bold" if offset else "normal")
            cells[0].set_xlabel(f"query: {class_names[labels[query]]}", fontsize=9)
            for cell, image, klass in zip(cells[1:], row.neighbours[query], row.classes[query], strict=True):
                _show(cell, image)
                _frame(cell, class_names[klass], right=klass == labels[query])
    grid[0][0].set_title("query", fontsize=10)
    for place, cell in enumerate(grid[0][1:], start=1):
        cell.set_title(f"neighbour {place}", fontsize=10)
    _save(figure, path)


def class_map(projection: Projection, class_names: Sequence[str], path: Path) -> None:
    """Draw one class in the plane: natural images grey, attacked ones by their predicted class (Fig. 1)."""
    _some(projection.natural, "natural images")
    _some(projection.adversarial, "attacked images")
    figure = _figure(6.8, 4.4)
    axes: Axes = figure.subplots()
    truth = int(projection.labels[0])
    name = class_names[truth]
    _dots(axes, projection.natural, f"natural {name}", (_GREY, "o"), 14, alpha=0.7, linewidths=0)
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
    _save(figure, path)


def pair_map(projection: Projection, source: int, target: int, class_names: Sequence[str], path: Path) -> None:
    """Draw two classes in the plane, and attacked images of `source` that are predicted as `target` (Fig. 2)."""
    _some(projection.natural, "natural images")
    figure = _figure(6.8, 4.4)
    axes: Axes = figure.subplots()
    for klass, mark in ((source, _MARKS[0]), (target, _MARKS[2])):
        members = projection.labels == klass
        points = projection.natural[members]
        _dots(axes, points, f"natural {class_names[klass]}", mark, 18, alpha=0.75, linewidths=0)
    label = f"attacked {class_names[source]},\ntaken for {class_names[target]}"
    _dots(axes, projection.adversarial, label, _MARKS[1], 34, edgecolors=_BLACK, linewidths=0.5)
    _finish_map(axes, f"{class_names[source]} attacked into {class_names[target]}")
    _save(figure, path)


def shift_bars(ratios: Mapping[str, ShiftRatios], path: Path) -> None:
    """Draw r and r' as bars, one per model or attack (Tables 2 and 3), with each class as a dot."""
    _some(ratios, "ratios")
    figure = _figure(7.0, 3.6)
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
                axes.scatter(spread, found, s=11, color="white", edgecolors=_BLACK, linewidths=0.7, zorder=3)
        axes.axhline(1, color=_BLACK, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.set(xlim=(-0.6, len(values) - 0.4), ylim=(0, 1.22 * tallest))
        axes.set_xticks(range(len(values)), list(ratios), rotation=30 if len(ratios) > 4 else 0)
        axes.set_title(title, fontsize=10)
        _plain(axes, grid="y")
    figure.supxlabel(
        "bars: mean over classes; dots: single classes; dashed line: as far as natural images", fontsize=8.5
    )
    left.set_ylabel("distance to natural images ÷ their own")
    _save(figure, path)


def _frame(cell: "Axes", name: str, *, right: bool) -> None:
    colour = _judge(cell, name, right=right)
    for spine in cell.spines.values():
        spine.set(edgecolor=colour, linewidth=2.4, linestyle="-" if right else (0, (2, 1.2)), capstyle="butt")


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


def _some(things: Any, what: str) -> None:
    if len(things) == 0:
        raise ValueError(f"there are no {what}: nothing to draw")
