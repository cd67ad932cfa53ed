"""Pictures of a run: how training went, and what the attack does to single images.

Colours are Okabe and Ito's, told apart by colour-blind readers; line styles and markers tell them apart in grey print.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160
_BLUE, _ORANGE, _GREEN, _PURPLE, _BLACK = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#000000"
_LOSSES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("train/loss", "total", {"color": _BLACK, "linestyle": "-", "marker": "o"}),
    ("train/cross_entropy", "cross-entropy", {"color": _BLUE, "linestyle": "--", "marker": "s"}),
    ("train/triplet", "triplet", {"color": _ORANGE, "linestyle": "-.", "marker": "^"}),
    ("train/norm", "norm", {"color": _GREEN, "linestyle": ":", "marker": "D"}),
)
_ACCURACIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("validation/clean_accuracy", "clean", {"color": _BLUE, "linestyle": "--", "marker": "s"}),
    ("validation/robust_accuracy", "under attack", {"color": _ORANGE, "linestyle": "-", "marker": "o"}),
)
_MANY_EPOCHS = 40  # from here on markers would touch each other


def training_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw losses and validation accuracies over the epochs, with the epoch marked whose weights are the best.

    That is the one with the highest validation accuracy under attack, then on clean images; the first of equals.
    `history` has a mapping per epoch with ``epoch`` (0, 1, ...) and metrics by their names in a run; what is missing or
    not finite is not drawn. ValueError if it is empty.
    """
    if not history:
        raise ValueError("the history is empty; draw after at least one epoch")
    figure = _figure(9.0, 3.6)
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    # The terms differ by orders of magnitude, so the axis is logarithmic; a term that is zero all along is left out.
    if any(value > 0 for key, _, _ in _LOSSES for _, value in _points(history, key)):
        losses.set_yscale("log")
    _draw(losses, history, [line for line in _LOSSES if any(value for _, value in _points(history, line[0]))])
    losses.set_ylabel("mean per training image, before weighting")
    losses.set_title("Losses", fontsize=11)
    _draw(accuracies, history, _ACCURACIES)
    accuracies.set_ylabel("validation accuracy [%]")
    accuracies.set_title("Accuracy on held-out images", fontsize=11)
    accuracies.set_ylim(-0.02, 1.02)
    accuracies.yaxis.set_major_formatter(_percent())
    _mark_best(accuracies, history)
    for axes in (losses, accuracies):
        _frame(axes, epochs)
    _save(figure, path)


def attack_panel(
    clean: npt.NDArray[np.floating[Any]],
    adversarial: npt.NDArray[np.floating[Any]],
    labels: Sequence[int],
    clean_predictions: Sequence[int],
    adversarial_predictions: Sequence[int],
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Draw a row per image: clean, perturbation, adversarial, with the predictions on the first and the last.

    Perturbations are drawn around mid-grey, all amplified by one factor, which the heading names. Images are
    (N, C, H, W) in [0, 1], with one or three channels; labels and predictions are (N,). ValueError without images.
    """
    if len(clean) == 0 or clean.shape != adversarial.shape:
        raise ValueError(f"images {clean.shape} and {adversarial.shape}: give at least one, in equal shapes")
    count = len(clean)
    figure = _figure(5.6, 0.5 + 1.85 * count)
    grid = figure.subplots(count, 3, squeeze=False)
    difference = adversarial - clean
    largest = float(np.abs(difference).max())
    factor = 0.5 / largest if largest > 0 else 1.0
    amplified = np.clip(0.5 + factor * difference, 0, 1)
    headings = ("clean", f"perturbation × {factor:.3g}\n(largest {255 * largest:.3g}/255)", "adversarial")  # noqa: RUF001
    for row in range(count):
        truth = int(labels[row])
        said = (int(clean_predictions[row]), None, int(adversarial_predictions[row]))
        for axes, image, prediction in zip(
            grid[row], (clean[row], amplified[row], adversarial[row]), said, strict=True
        ):
            _show(axes, image)
            if prediction is not None:
                _judge(axes, class_names[prediction], right=prediction == truth)
        grid[row][0].set_ylabel(f"true: {class_names[truth]}", fontsize=9)
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=10)
    _save(figure, path)


def _figure(width_inches: float, height_inches: float) -> "Figure":
    """A figure with a canvas of its own: pyplot would keep it alive, and choose a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, format="png")


def _draw(
    axes: "Axes", history: Sequence[Mapping[str, float]], lines: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> None:
    for key, label, style in lines:
        points = _points(history, key)
        if points:
            marker = {"marker": None} if len(points) > _MANY_EPOCHS else {}
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=label, linewidth=1.6, markersize=4.5, **{**style, **marker})


def _points(history: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[key]) for row in history if key in row and np.isfinite(row[key])]


def _mark_best(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    points = _points(history, "validation/robust_accuracy")
    if not points:
        return
    clean = dict(_points(history, "validation/clean_accuracy"))
    epoch, accuracy = max(points, key=lambda point: (point[1], clean.get(point[0], 0.0), -point[0]))
    axes.axvline(epoch, color=_PURPLE, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    axes.plot(
        [epoch],
        [accuracy],
        marker="*",
        markersize=16,
        color=_PURPLE,
        markerfacecolor="none",
        markeredgewidth=1.6,
        linestyle="none",
        zorder=5,
        label=f"best: {accuracy:.1%}, epoch {epoch:.0f}",
    )


def _frame(axes: "Axes", epochs: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    if len(set(epochs)) == 1:  # a single epoch has no extent of its own, so it is given one
        room = 0.5
        axes.set_xticks([epochs[0]], [f"{epochs[0]:.0f}"])
    else:
        room = 0.03 * (max(epochs) - min(epochs))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(min(epochs) - room, max(epochs) + room)
    _plain(axes)
    if axes.get_legend_handles_labels()[0]:
        _legend(axes)


def _plain(axes: "Axes", grid: Any = "both") -> None:
    axes.grid(visible=True, axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: "Axes") -> None:
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.85, fontsize=8.5, loc="best", handlelength=3.2)


def _judge(axes: "Axes", name: str, *, right: bool) -> str:
    """Write a prediction below an image; gives the colour that says whether it is right."""
    colour = _BLUE if right else _ORANGE
    text = f"{'✓' if right else '✗'} {name}"
    axes.set_xlabel(text, color=colour, fontsize=9, fontweight="normal" if right else "bold")
    return colour


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=0)


def _show(axes: "Axes", image: npt.NDArray[np.floating[Any]]) -> None:
    """Draw one (C,H,W) image in [0, 1], pixel by pixel."""
    pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
