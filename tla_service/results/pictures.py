"""Pictures of a table: methods under the strongest attacks, and accuracy against the size of the pool."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tla_service.results.statistics import Row, over_seeds


def method_bars(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Means over seeds with every seed as a dot, a group of bars for each measure."""
    drawn = Figure(figsize=(8, 3.4), layout="constrained")
    axes = drawn.subplots()
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        left = [group - 0.4 + (place + 0.5) * width for group in range(len(names))]
        found = [row.values(name) for name in names]
        heights = [100 * estimate.value if (estimate := over_seeds(values)) else 0.0 for values in found]
        axes.bar(left, heights, width * 0.92, label=row.label)
        for x, values in zip(left, found, strict=True):
            axes.plot([x] * len(values), [100 * value for value in values], "k.", markersize=3)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(ncols=len(rows), loc="upper center", bbox_to_anchor=(0.5, 1.16), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(drawn, path)


def pool_curve(rows: Mapping[int, Row], names: Sequence[str], path: Path) -> None:
    """Accuracy under some attacks against the size of the pool that negatives are mined from."""
    drawn = Figure(figsize=(5, 3.2), layout="constrained")
    axes = drawn.subplots()
    for name in names:
        points = [
            (size, 100 * estimate.value) for size, row in rows.items() if (estimate := over_seeds(row.values(name)))
        ]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_xscale("symlog", linthresh=200)
    axes.set_xticks(list(rows), [str(size) for size in rows])
    axes.set_xlabel("images in the pool")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(drawn, path)


def _save(drawn: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)
