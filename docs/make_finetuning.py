"""Train the runs behind docs/finetuning.md, on one CPU core in about ten minutes; print its tables, draw its picture.

    OMP_NUM_THREADS=1 python -m docs.make_finetuning runs/finetuning

Finished runs are reused. Every run selects its weights on its own validation split; the test set is measured once per
run and chooses nothing.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tla_service import load_config, train
from tla_service.evaluation.figures import BLUE, ORANGE, new_figure, save
from tla_service.job import code_version

SEEDS = (0, 1, 2)
CLEAN_WEIGHTS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
PICTURE = Path(__file__).parent / "pictures" / "finetuning.png"


def measure(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Summaries of all runs, over the seeds. The seed of a natural run is that of its fine-tuning: same split."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in SEEDS:

        def run(label: str, preset: str, seed: int = seed, **settings: Any) -> dict[str, Any]:
            config = load_config(preset, seed=seed, **settings)
            summary = train(config, folder / f"{label.replace(' ', '-')}-s{seed}")
            runs.setdefault(label, []).append(summary)
            return summary

        natural = run("natural", "digits", method="natural", training={"epochs": 20})
        for epochs in (15, 40):
            run(f"scratch {epochs}", "digits", training={"epochs": epochs})
        model = {"pretrained": natural["checkpoint"]}
        for weight in CLEAN_WEIGHTS:
            run(f"weight {weight:g}", "finetune_digits", model=model, loss={"clean_weight": weight})
    return runs


def shown(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * statistics.stdev(values):.{digits}f}"


def accuracies(summaries: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Clean accuracy and accuracy under PGD on the test set, by seed."""
    return [each["clean_accuracy"] for each in summaries], [each["robust_accuracy"]["pgd50x3"] for each in summaries]


def row(label: str, summaries: Sequence[dict[str, Any]]) -> str:
    """A line of a table: accuracies on the test set in percent, and seconds of training steps."""
    seconds = [each["wall_seconds"]["train"] for each in summaries]
    return f"| {label} | {' | '.join(map(shown, accuracies(summaries)))} | {shown(seconds, 1)} |"


def draw(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The trade-off curve: means over seeds, with standard deviations."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    points = []
    for label, color, name in (
        *((f"weight {weight:g}", BLUE, f"{weight:g}") for weight in CLEAN_WEIGHTS),
        ("scratch 40", ORANGE, "from scratch, 40 epochs"),
    ):
        clean, robust = ([100 * value for value in values] for values in accuracies(runs[label]))
        x, y = statistics.mean(clean), statistics.mean(robust)
        errors = {"xerr": statistics.stdev(clean), "yerr": statistics.stdev(robust)}
        axes.errorbar([x], [y], **errors, color=color, marker="o", capsize=3, linewidth=1)
        axes.annotate(name, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8.5)
        points += [(x, y)] if color == BLUE else []
    axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.2)
    axes.set_xlabel("clean accuracy [%]")
    axes.set_ylabel("accuracy under PGD-50, 3 restarts [%]")
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    save(figure, PICTURE)


def main(folder: Path) -> None:
    """Train, print and draw."""
    runs = measure(folder)
    head = ("| run | clean [%] | PGD-50x3 [%] | training [s] |", "|---|---|---|---|")
    lines = ["", str(code_version()), *head, *(row(label, summaries) for label, summaries in runs.items())]
    print("\n".join(lines))  # noqa: T201
    draw(runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
