"""Write README's table: what each method gains on MNIST over AT, and how long its step takes.

    python -m docs.make_readme

Accuracies come from docs/results/mnist-tuned.md, times from docs/results/performance-cpu.json.
"""

import json
import re
from pathlib import Path

from benchmarks.results import markdown
from benchmarks.workloads import CPU_WORKLOADS

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- mnist: begin -->\n).*?(\n<!-- mnist: end -->)", re.DOTALL)
_COLUMNS = {"clean": "clean", "pgd100": "PGD-100", "pgd100 less AT": "PGD-100 less AT", "autoattack": "AutoAttack"}


def table() -> str:
    """A row for each method that has been tuned and timed."""
    steps = json.loads((RESULTS / "performance-cpu.json").read_text())["tables"]["Steps"]["rows"]
    times = {
        "TLA" if step == "TLA, pool: batch" else step: time.partition(" ")[0]
        for network, step, _, time in steps
        if network == CPU_WORKLOADS["small_cnn_4"].name
    }
    page = (RESULTS / "mnist-tuned.md").read_text(encoding="utf-8")
    accuracy = page.partition("## Accuracy, %\n\n")[2].partition("\n\n")[0]
    titles, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in accuracy.splitlines())
    found = [dict(zip(titles, line, strict=True)) for line in lines]
    rows = [
        [row["method"], *(row[column] for column in _COLUMNS), times[row["method"]]]
        for row in found
        if row["method"] in times
    ]
    return "\n".join(markdown(["method", *_COLUMNS.values(), "step time over AT"], rows))


def filled(readme: str) -> str:
    """README with its table written anew."""
    return BLOCK.sub(lambda found: found[1] + table() + found[2], readme)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
