"""A campaign: a fault for each seed, what became of the run, and the page of all."""

import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tests.chaos.faults import FAULTS, Struck, struck_run
from tests.chaos.world import World
from tests.cluster.test_chaos import SECONDS

ROOT = Path(__file__).parents[2]
_SENT = ("train/", "validation/", "test/", "step", "learning")


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Attributes:
        trouble: Why it did not recover as promised; empty if it did.
        seconds: From the fault to the next step that had not been done before.
        repeated: Steps that were done again.
    """

    seed: int
    fault: str
    commit: str
    trouble: str
    seconds: float
    repeated: int
    wall: float


@dataclass(frozen=True)
class Outcome:
    """What a run has come to: its weights, and in MLflow (step, value) of each metric."""

    weights: str
    history: dict[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, world: World, struck: Struck) -> "Outcome":
        """Of a finished run; its metrics to ten digits, since sums may be added up in another order after a restart."""
        client = MlflowClient(world.tracking.uri)
        (version,) = client.search_model_versions(f"name='tla-{struck.name}'")
        run = client.get_run(version.run_id)
        names = [name for name in run.data.metrics if name.startswith(_SENT)]
        points = {name: client.get_metric_history(version.run_id, name) for name in names}
        history = {
            name: sorted((point.step, float(f"{point.value:.10g}")) for point in found)
            for name, found in points.items()
        }
        return cls(str(version.tags["weights_sha256"]), history)


def undisturbed(world: World) -> Outcome:
    """The run to which nothing happens."""
    with tempfile.TemporaryDirectory() as folder, struck_run(world, 0, f"calm-{os.getpid()}", Path(folder)) as struck:
        printed = struck.start().wait(SECONDS)
        assert struck.job.process.returncode == 0, printed
        return Outcome.of(world, struck)


def play(world: World, seed: int, expected: Outcome) -> Result:
    """Let the fault of a seed strike a run, and compare what becomes of it with the undisturbed run."""
    fault, began = list(FAULTS)[seed % len(FAULTS)], time.monotonic()
    trouble, seconds, repeated = "", float("nan"), 0
    name = f"{fault.replace('_', '-')}-{seed}-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="tla-chaos-run-") as folder:
        with struck_run(world, seed, name, Path(folder)) as struck:
            try:
                FAULTS[fault](struck)
                printed = struck.job.wait(SECONDS)
                trouble = _trouble(world, struck, printed, expected)
                seconds, repeated = recovery(struck.job.records(), struck.began)
            except Exception:  # noqa: BLE001 - one seed must not end the campaign
                trouble = traceback.format_exc(limit=3)
    return Result(seed, fault, commit(), trouble, seconds, repeated, round(time.monotonic() - began, 1))


def _trouble(world: World, struck: Struck, printed: str, expected: Outcome) -> str:
    if struck.job.process.returncode != 0:
        return f"exit code {struck.job.process.returncode}: {printed[-1000:]}"
    if "Traceback" in printed:
        return f"a traceback was printed: {printed[-1000:]}"
    found = Outcome.of(world, struck)
    if found.weights != expected.weights:
        return "other weights than the undisturbed run"
    wrong = [name for name in expected.history if found.history.get(name) != expected.history[name]]
    return f"metrics lost or doubled: {', '.join(wrong)}" if wrong else ""


def recovery(records: list[dict[str, Any]], struck_at: float) -> tuple[float, int]:
    """Seconds from the fault to the next new step, after the last restart if there was one; steps that were repeated.

    Steps that were on their way when the fault struck arrive after it.
    """
    starts = [record for record in records if record["event"] == "start" and record["time"] > struck_at]
    after = starts[-1]["time"] if starts else struck_at
    done, repeated, seconds = 0, 0, math.nan
    for record in records:
        if record["event"] == "start":
            resumed = int(Path(record.get("resumed_from") or "step-0").name.partition("-")[2])
            repeated += max(0, done - resumed)
        if record["event"] != "step" or record["step"] <= done:
            continue
        done = int(record["step"])
        if record["time"] > after and math.isnan(seconds):
            seconds = record["time"] - struck_at
    return round(seconds, 1), repeated


def commit() -> str:
    """The commit of this checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def table(results: list[Result]) -> list[str]:
    """A row for each fault and one for all: recoveries, seconds to the next step, steps repeated."""
    lines = [
        "| fault | seeds | recovered | seconds to the next step, median (worst) | steps repeated, median (worst) |"
    ]
    lines.append("|---" * 5 + "|")
    for fault in [*FAULTS, ""]:
        found = [each for each in results if fault in ("", each.fault)]
        if not found:
            continue
        well = [each for each in found if not each.trouble]
        what = (FAULTS[fault].__doc__ or "").partition("\n")[0].rstrip(".") if fault else "**all**"
        seconds, repeated = [each.seconds for each in well], [each.repeated for each in well]
        cells = [f"{statistics.median(values):g} ({max(values):g})" if values else "" for values in (seconds, repeated)]
        seeds = ", ".join(str(each.seed) for each in found) if fault else str(len(found))
        lines.append(f"| {what} | {seeds} | {len(well)} of {len(found)} | {cells[0]} | {cells[1]} |")
    return lines


def write_page(results: list[Result], page: Path) -> None:
    """Replace the table of the page."""
    commits = ", ".join(sorted({each.commit for each in results}))
    made = f"Made by `python -m tests.chaos --seeds {len(results)}` at {commits} on {os.cpu_count()} CPU cores "
    made += f"({platform.machine()})."
    failed = [f"- seed {each.seed}, {each.fault}: {each.trouble.splitlines()[-1]}" for each in results if each.trouble]
    lines = [*table(results), "", made, *(["", "Not recovered:", "", *failed] if failed else [])]
    write_part(page, "campaign", "\n".join(lines) + "\n")


def write_part(page: Path, name: str, text: str) -> None:
    """Replace what a page has between two marks."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, _, rest = page.read_text().partition(begin)
    page.write_text(head + begin + text + end + rest.partition(end)[2])


def load(path: Path) -> list[Result]:
    """The results so far."""
    return [Result(**each) for each in json.loads(path.read_text())] if path.exists() else []


def save(path: Path, results: list[Result]) -> None:
    """Write all results."""
    path.write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n")
