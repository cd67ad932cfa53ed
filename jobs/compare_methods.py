"""Train several methods on one preset, a few seeds each, and write their accuracies side by side.

    python jobs/compare_methods.py --preset digits --seeds 3 --output docs/results/digits.md

Runs are processes of their own on this machine, without Ray; one that has finished is not repeated. Flags this script
does not know go to every run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tla_service

METHODS = ("natural", "at", "alp", "tla", "tla_rn", "tla_sa")


def train(folder: Path, arguments: list[str]) -> dict[str, float]:
    """Train one run, unless it has finished, and read its accuracies on the test set."""
    command = [sys.executable, "-m", "tla_service.training", *arguments, "--output", str(folder)]
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "printed.txt").open("w") as printed:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=printed, stderr=subprocess.STDOUT, env=environment)
    summary = json.loads((folder / "summary.json").read_text())
    robust = {f"robust_accuracy {name}": value for name, value in summary["robust_accuracy"].items()}
    return {"clean_accuracy": summary["clean_accuracy"], **robust}


def cell(values: list[float]) -> str:
    """Mean over seeds and their standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    """Train, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    options, others = parser.parse_known_args()
    shared = ["--preset", options.preset, *others]
    jobs = {
        (method, seed): (
            options.runs / f"{options.preset}-{method}-s{seed}",
            [*shared, "--method", method, "--seed", str(seed)],
        )
        for seed in range(options.seeds)
        for method in options.methods
    }
    with ThreadPoolExecutor(options.side_by_side) as pool:
        results = dict(zip(jobs, pool.map(lambda job: train(*job), jobs.values()), strict=True))
    columns = list(results[options.methods[0], 0])
    lines = ["| method | " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for method in options.methods:
        found = [cell([results[method, seed][column] for seed in range(options.seeds)]) for column in columns]
        lines.append(f"| `{method}` | " + " | ".join(found) + " |")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout
    command = f"python jobs/compare_methods.py --seeds {options.seeds} --output {options.output} {' '.join(shared)}"
    lines += [
        "",
        f"Accuracy on the test set in percent, mean and standard deviation over {options.seeds} seeds, of the weights "
        "that were best on validation. `worst` counts an image only if no attack in the table breaks it.",
        f"Made by `{command}` at {commit.strip() or tla_service.__version__} on {os.cpu_count()} CPU cores "
        f"({platform.machine()}), one core a run.",
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
