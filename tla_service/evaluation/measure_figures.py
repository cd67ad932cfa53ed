"""Pictures of the measures: ROC curves, retrieval, t-SNE, shift ratios (Mao et al. 2019, Figs. 1, 2, 4, 5).

Marks, hatches or line styles repeat what colours say, for colour-blind readers and grey print.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from tla_service.evaluation.neighbours import Retrieval
from tla_service.inference.detector import Floats

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


def roc_curves(results: Mapping[str, RocCurve], path: Path) -> None:
    """Draw the ROC curve of every score, with its AUC and 95% interval in the legend (Fig. 5).

    An undefined one is named there, with the reason. No result raises ValueError.
    """
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


def retrieval_panel(
    retrieval: Retrieval,
    clean: Floats,
    attacked: Floats,
    clean_neighbours: Floats,
    attacked_neighbours: Floats,
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Draw two rows per query: it and its nearest training images, clean and then attacked (Fig. 4).

    A neighbour of the query's class has a solid blue frame and a tick, another one a dashed orange frame and a cross.
    Queries are (Q, C, H, W) in [0, 1], neighbours (Q, n, C, H, W); what does not fit the retrieval raises ValueError.
    """
    wanted = retrieval.clean_neighbours.shape
    shapes = [clean.shape[:1], attacked.shape[:1], clean_neighbours.shape[:2], attacked_neighbours.shape[:2]]
    if not wanted[0] or shapes != [wanted[:1], wanted[:1], wanted, wanted]:
        raise ValueError(f"images of leading shapes {shapes} for {wanted} neighbours: give queries (Q,), images (Q, n)")
    queries, count = wanted
    figure = _figure(1.35 * (count + 1) + 0.5, 0.35 + 1.5 * 2 * queries)
    grid = figure.subplots(2 * queries, count + 1, squeeze=False)
    for query in range(queries):
        name = class_names[retrieval.labels[query]]
        rows = (
            ("clean", clean, clean_neighbours, retrieval.clean_classes),
            ("attacked", attacked, attacked_neighbours, retrieval.attacked_classes),
        )
        for offset, (state, images, found, classes) in enumerate(rows):
            cells = grid[2 * query + offset]
            _show(cells[0], images[query])
            cells[0].set_ylabel(state, fontsize=9, fontweight="bold" if offset else "normal")
            cells[0].set_xlabel(f"query: {name}", fontsize=9)
            for cell, image, klass in zip(cells[1:], found[query], classes[query], strict=True):
                _show(cell, image)
                _frame(cell, class_names[klass], right=klass == retrieval.labels[query])
    grid[0][0].set_title("query", fontsize=10)
    for place, cell in enumerate(grid[0][1:], start=1):
        cell.set_title(f"neighbour {place}", fontsize=10)
    _save(figure, path)


def class_map(projection: Projection, class_names: Sequence[str], path: Path) -> None:
    """Draw one class in the plane: natural images grey, attacked ones by their predicted class (Fig. 1).

    No natural or no attacked images raise ValueError.
    """
    _some(projection.natural, "natural images")
    _some(projection.adversarial, "attacked images")
    figure = _figure(6.8, 4.4)
    axes: Axes = figure.subplots()
    truth = int(projection.natural_labels[0])
    name = class_names[truth]
    label = f"natural {name} ({len(projection.natural)})"
    _dots(axes, projection.natural, (_GREY, "o"), s=14, alpha=0.7, linewidths=0, label=label)
    said = projection.adversarial_predictions
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
    for (label, members), mark in zip(groups, _MARKS, strict=False):
        style = {"s": 30, "alpha": 0.85, "edgecolors": "white", "linewidths": 0.4, "label": _counted(label, members)}
        _dots(axes, projection.adversarial[members], mark, **style)
    _finish_map(axes, f"True class {name}: natural and attacked images")
    _save(figure, path)


def pair_map(projection: Projection, source: int, target: int, class_names: Sequence[str], path: Path) -> None:
    """Draw two classes in the plane, and attacked images of `source` that are predicted as `target` (Fig. 2).

    No natural images raise ValueError.
    """
    _some(projection.natural, "natural images")
    figure = _figure(6.8, 4.4)
    axes: Axes = figure.subplots()
    for klass, mark in ((source, _MARKS[0]), (target, _MARKS[2])):
        members = projection.natural_labels == klass
        label = _counted(f"natural {class_names[klass]}", members)
        _dots(axes, projection.natural[members], mark, s=18, alpha=0.75, linewidths=0, label=label)
    label = _counted(f"attacked {class_names[source]},\ntaken for {class_names[target]}", projection.adversarial_labels)
    _dots(axes, projection.adversarial, _MARKS[1], s=34, label=label, edgecolors=_BLACK, linewidths=0.5)
    _finish_map(axes, f"{class_names[source]} attacked into {class_names[target]}")
    _save(figure, path)


def shift_bars(ratios: Mapping[str, ShiftRatios], path: Path) -> None:
    """Draw r and r' as bars, one per model or attack (Tables 2 and 3), with each class as a dot.

    No ratios raise ValueError.
    """
    _some(ratios, "ratios")
    figure = _figure(7.0, 3.6)
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "r: mistaken for the class (higher is better)", [x.r for x in ratios.values()]),
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


def _dots(axes: "Axes", points: Floats, mark: tuple[str, str], **style: Any) -> None:
    axes.scatter(points[:, 0], points[:, 1], color=mark[0], marker=mark[1], **style)


def _finish_map(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel("t-SNE, first axis (no unit)", fontsize=9)
    axes.set_ylabel("second axis", fontsize=9)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)


def _counted(label: str, members: Any) -> str:
    return f"{label} ({int(members.sum()) if members.dtype == np.bool_ else len(members)})"


def _some(things: Any, what: str) -> None:
    if len(things) == 0:
        raise ValueError(f"there are no {what}: nothing to draw")
