"""Pictures of accuracy under corruptions and of calibration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tla_service.evaluation import figures as fg
from tla_service.evaluation.beyond import Calibration, Corruptions


def corruption_lines(found: Corruptions, path: Path) -> None:
    """Draw a line per corruption, its accuracy at severities 1 to 5 as dots on it, and clean accuracy."""
    axes: Any = fg.new_figure(5.6, 4.8).subplots()
    names = list(found.by_name)[::-1]  # the lowest on top
    for row, name in enumerate(names):
        points = [share.estimate for share in found.accuracy[name]]
        axes.plot(points, [row] * len(points), color=fg.GREY, linewidth=1, zorder=1)
        shades = [str(shade) for shade in np.linspace(0.8, 0.0, len(points))]
        axes.scatter(points, [row] * len(points), c=shades, s=26, edgecolors=fg.BLACK, linewidths=0.5, zorder=2)
    axes.axvline(found.clean.estimate, color=fg.BLUE, linewidth=1.2, linestyle="--", label="clean")
    axes.scatter([], [], c="0.8", s=26, edgecolors=fg.BLACK, linewidths=0.5, label="severity 1")
    axes.scatter([], [], c="0.0", s=26, edgecolors=fg.BLACK, linewidths=0.5, label="severity 5")
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlim=(-0.02, 1.02), xlabel="accuracy [%]")
    axes.xaxis.set_major_formatter(fg.PERCENT)
    fg.finish(axes, path)


def reliability_diagram(found: Mapping[str, Calibration], path: Path) -> None:
    """Draw accuracy against confidence, by bins, with 95% intervals; larger marks stand for more images."""
    axes: Any = fg.new_figure(5.0, 4.6).subplots()
    axes.plot([0, 1], [0, 1], color=fg.GREY, linewidth=1, linestyle=(0, (2, 2)), label="calibrated")
    for (name, each), (colour, mark) in zip(found.items(), ((fg.BLUE, "o"), (fg.ORANGE, "s")), strict=False):
        bins = [part for part in each.bins if part.confidence is not None]
        x, y = [part.confidence for part in bins], [part.accuracy.estimate or 0.0 for part in bins]
        low = [value - part.accuracy.low for value, part in zip(y, bins, strict=True)]
        high = [part.accuracy.high - value for value, part in zip(y, bins, strict=True)]
        axes.errorbar(x, y, yerr=[low, high], color=colour, linewidth=1, fmt="none", capsize=2)
        sizes = [12 + 120 * part.accuracy.images / each.accuracy.images for part in bins]
        axes.scatter(x, y, s=sizes, color=colour, marker=mark, label=f"{name}: ECE {100 * each.ece:.1f} %", zorder=3)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy, bar: 95% interval")
    axes.xaxis.set_major_formatter(fg.PERCENT)
    axes.yaxis.set_major_formatter(fg.PERCENT)
    fg.finish(axes, path)
