"""Pictures of a run: how training went, and what the attack does to single images.

Colours are Okabe and Ito's, told apart by colour-blind readers; line styles and markers tell them apart in grey print.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tla_service.inference.detector import Floats, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160
PERCENT = "{x:.0%}"  # format of ticks that are shares
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
BLACK, GREY = "#000000", "#9A9A9A"
_LOSSES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("train/loss", "total", {"color": BLACK, "linestyle": "-", "marker": "o"}),
    ("train/cross_entropy", "cross-entropy", {"color": BLUE, "linestyle": "--", "marker": "s"}),
    ("train/triplet", "triplet", {"color": ORANGE, "linestyle": "-.", "marker": "^"}),
    ("train/norm", "norm", {"color": GREEN, "linestyle": ":", "marker": "D"}),
)
_ACCURACIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("validation/clean_accuracy", "clean", {"color": BLUE, "linestyle": "--", "marker": "s"}),
    ("validation/robust_accuracy", "under attack", {"color": ORANGE, "linestyle": "-", "marker": "o"}),
)
_MOST_MARKERS = 40  # more would touch each other


def training_curves(history: Sequence[Mapping[str, float]], best: Mapping[str, float], path: Path) -> None:
    """Draw losses and validation accuracies over the epochs, with the one marked, `best`, whose weights are kept.

    `history` has a mapping per epoch with ``epoch`` (0, 1, ...) and metrics by their names in a run; what is missing or
    not finite is not drawn. ValueError if it is empty.
    """
    if not history:
        raise ValueError("the history is empty; draw after at least one epoch")
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9.0, 3.6)
    losses, accuracies = figure.subplots(1, 2, sharex=True)
    # The terms differ by orders of magnitude, so the axis is logarithmic; a term that is zero all along is left out.
    terms = [line for line in _LOSSES if any(value for _, value in _points(history, line[0]))]
    if terms:
        losses.set_yscale("log")
    _draw(losses, history, terms)
    losses.set_ylabel("mean per training image, before weighting")
    losses.set_title("Losses", fontsize=11)
    _draw(accuracies, history, _ACCURACIES)
    accuracies.set(ylabel="validation accuracy [%]", ylim=(-0.02, 1.02))
    accuracies.set_title("Accuracy on held-out images", fontsize=11)
    accuracies.yaxis.set_major_formatter(PERCENT)
    _mark_best(accuracies, best)
    room = 0.5 + 0.02 * len(history)
    losses.set_xlim(history[0]["epoch"] - room, history[-1]["epoch"] + room)
    for axes in (losses, accuracies):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        plain(axes)
        if axes.get_legend_handles_labels()[0]:
            legend(axes)
    save(figure, path)


def attack_panel(
    clean: Floats,
    adversarial: Floats,
    labels: Sequence[int],
    clean_predictions: Sequence[int],
    adversarial_predictions: Sequence[int],
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Draw a row per image: clean, perturbation, adversarial, with the predictions on the first and the last.

    Perturbations are drawn around mid-grey, all amplified by one factor, which the heading names. Images are
    (N, C, H, W) in [0, 1], with one or three channels; labels and predictions are (N,).
    """
    count = len(clean)
    figure = new_figure(5.6, 0.5 + 1.85 * count)
    grid = figure.subplots(count, 3, squeeze=False)
    difference = adversarial - clean
    largest = float(np.abs(difference).max())
    factor = 0.5 / largest if largest > 0 else 1.0
    amplified = np.clip(0.5 + factor * difference, 0, 1)
    headings = ("clean", f"perturbation × {factor:.3g}\n(largest {255 * largest:.3g}/255)", "adversarial")  # noqa: RUF001
    for row, (cells, truth) in enumerate(zip(grid, labels, strict=True)):
        for axes, images in zip(cells, (clean, amplified, adversarial), strict=True):
            show(axes, images[row])
        for axes, predictions in ((cells[0], clean_predictions), (cells[2], adversarial_predictions)):
            judge(axes, class_names[predictions[row]], right=predictions[row] == truth)
        cells[0].set_ylabel(f"true: {class_names[truth]}", fontsize=9)
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=10)
    save(figure, path)


class PanelRow(NamedTuple):
    """Queries (Q, C, H, W) in [0, 1], their nearest training images (Q, n, C, H, W), and their classes (Q, n)."""

    queries: Floats
    neighbours: Floats
    classes: Integers


def retrieval_panel(labels: Integers, states: Mapping[str, PanelRow], class_names: Sequence[str], path: Path) -> None:
    """Draw a row per query and state (clean, attacked): it and its nearest training images (Fig. 4).

    A neighbour of the query's class (`labels`, (Q,)) has a solid blue frame and a tick, others a dashed orange frame
    and a cross.
    """
    queries, count = next(iter(states.values())).classes.shape
    figure = new_figure(1.35 * (count + 1) + 0.5, 0.35 + 1.5 * len(states) * queries)
    grid = figure.subplots(len(states) * queries, count + 1, squeeze=False)
    for query in range(queries):
        for offset, (state, row) in enumerate(states.items()):
            cells = grid[len(states) * query + offset]
            show(cells[0], row.queries[query])
            cells[0].set_ylabel(state, fontsize=9, fontweight="bold" if offset else "normal")
            cells[0].set_xlabel(f"query: {class_names[labels[query]]}", fontsize=9)
            for cell, image, klass in zip(cells[1:], row.neighbours[query], row.classes[query], strict=True):
                show(cell, image)
                right = klass == labels[query]
                colour, line = judge(cell, class_names[klass], right=right), "-" if right else (0, (2, 1.2))
                cell.spines[:].set(edgecolor=colour, linewidth=2.4, linestyle=line, capstyle="butt")
    grid[0][0].set_title("query", fontsize=10)
    for place, cell in enumerate(grid[0][1:], start=1):
        cell.set_title(f"neighbour {place}", fontsize=10)
    save(figure, path)


def new_figure(width_inches: float, height_inches: float) -> "Figure":
    """A figure with a canvas of its own: pyplot would keep it alive, and choose a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG file; its folder is made."""
    from matplotlib.text import Text

    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        if "$" in text.get_text():
            text.set_parse_math(False)  # names of classes are no formulas; tick labels, which may be, come later
    figure.savefig(path, dpi=_DPI, format="png")


def _draw(
    axes: "Axes", history: Sequence[Mapping[str, float]], lines: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> None:
    for key, label, style in lines:
        points = _points(history, key)
        every = 1 + len(points) // _MOST_MARKERS
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.6, markersize=4.5, markevery=every, **style)


def _points(history: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[key]) for row in history if key in row and np.isfinite(row[key])]


def _mark_best(axes: "Axes", best: Mapping[str, float]) -> None:
    points = [point for key, *_ in _ACCURACIES for point in _points([best], key)]
    if not points:
        return
    epoch = best["epoch"]
    axes.axvline(epoch, color=PURPLE, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    style: dict[str, Any] = {"markersize": 16, "markerfacecolor": "none", "markeredgewidth": 1.6, "zorder": 5}
    label = f"best weights, epoch {epoch:.0f}"
    axes.plot(*zip(*points, strict=True), marker="*", color=PURPLE, linestyle="none", label=label, **style)


def plain(axes: "Axes", grid: Any = "both") -> None:
    """A light grid and no frame on the top and the right."""
    axes.grid(visible=True, axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes: "Axes") -> None:
    """A legend inside the axes."""
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.85, fontsize=8.5, loc="best", handlelength=3.2)


def finish(axes: Any, path: Path) -> None:
    """Grid and legend of a picture with one set of axes, and its file."""
    plain(axes)
    legend(axes)
    save(axes.figure, path)


def judge(axes: "Axes", name: str, *, right: bool) -> str:
    """Write a prediction below an image; gives the colour that says whether it is right."""
    colour = BLUE if right else ORANGE
    text = f"{'✓' if right else '✗'} {name}"
    axes.set_xlabel(text, color=colour, fontsize=9, fontweight="normal" if right else "bold")
    return colour


def show(axes: "Axes", image: Floats) -> None:
    """Draw one (C,H,W) image in [0, 1], pixel by pixel."""
    pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
