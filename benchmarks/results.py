"""Results of a benchmark: tables, ratios for the regression check, raw numbers for models; as text and JSON."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Spread
from tla_service import __version__
from tla_service.errors import UnavailableError
from tla_service.files import write_whole
from tla_service.runtime import hardware

# A ratio that grew by more than this share is reported.
TOLERANCE = 0.10


@dataclass
class Results:
    """Tables, ratios (lower is better) and raw measurements by name, and their origin."""

    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float | None]] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def table(self, name: str, columns: list[str], rows: list[list[str]]) -> None:
        """Keep a table, and print it."""
        self.tables[name] = {"columns": columns, "rows": rows}
        print(f"\n{name}\n" + "\n".join(markdown(columns, rows)), flush=True)

    def ratio(self, name: str, spread: Spread, bar: float | None = None) -> None:
        """Keep a ratio, with its threshold if it has one."""
        self.ratios[name] = {"median": spread.median, "low": spread.low, "high": spread.high, "bar": bar}

    def on_top_of(self, earlier: "Results", stages: list[str], *, is_main: bool = False) -> "Results":
        """An earlier run's results, with these in place of what was measured again, network by network.

        Args:
            earlier: What is kept of: everything that these results have not.
            stages: What was measured again, for the facts.
            is_main: These are all stages that run by default; the facts become this run's.
        """
        origin = {name: self.facts[name] for name in ("command", "commit", "device")}
        took = {name: value for name, value in self.facts.items() if is_main or name.startswith("seconds of ")}
        again = earlier.facts.get("again", {})
        again = {stage: run for stage, run in again.items() if stage.partition(" of ")[0] not in stages}
        facts = earlier.facts | took | {"again": again | ({} if is_main else dict.fromkeys(stages, origin))}
        tables = earlier.tables | {
            name: _merged(earlier.tables.get(name), table) for name, table in self.tables.items()
        }
        return Results(facts, tables, earlier.ratios | self.ratios, earlier.raw | self.raw)

    def write(self, path: Path) -> None:
        """Write everything as JSON; called after every stage, so that an interrupted run keeps its results."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.__dict__, indent=1) + "\n")


def _merged(earlier: dict[str, Any] | None, table: dict[str, Any]) -> dict[str, Any]:
    """A table with the rows of other networks, which the first column names, from an earlier one.

    Of one network as well, rows of other settings are kept: each is measured for itself.
    """
    if earlier is None or earlier["columns"] != table["columns"] or "network" not in table["columns"][:1]:
        return table
    named = 2 if table["columns"][1] == "settings" else 1
    measured = [row[:named] for row in table["rows"]]
    return {**table, "rows": [row for row in earlier["rows"] if row[:named] not in measured] + table["rows"]}


def read_results(path: Path) -> Results:
    """Read the results of an earlier run.

    Raises:
        UnavailableError: The file is something else.
    """
    try:
        return Results(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UnavailableError("output", path, "holds no results of a benchmark", "choose another --output") from error


def facts() -> dict[str, Any]:
    """Hardware, versions, commit and command."""
    # A copy of the tree may lack git, or have another commit's.
    describe = ["git", "describe", "--always", "--dirty"]
    commit = os.environ.get("GIT_COMMIT")
    commit = commit or subprocess.run(describe, capture_output=True, text=True, check=False).stdout
    return {
        "device": hardware(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.strip() or __version__,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "load before": os.getloadavg()[0],
    }


def worsened(found: dict[str, dict[str, float | None]], kept: dict[str, float]) -> list[str]:
    """A line for each ratio over 10 % above the kept one and whose lower quartile is above it."""
    lines = []
    for name, spread in found.items():
        before, now, low = kept.get(name), spread["median"], spread["low"]
        if before is None or now is None or low is None:
            continue
        if now > before * (1 + TOLERANCE) and low > before:
            lines.append(f"{name}: {now:.3f}, was {before:.3f}: {100 * (now / before - 1):.0f} % worse")
    return lines


def read_ratios(path: Path) -> dict[str, float]:
    """Kept ratios by name; empty without a file."""
    if not path.exists():
        return {}
    ratios: dict[str, float] = json.loads(path.read_text())
    return ratios


def keep_ratios(path: Path, found: dict[str, dict[str, float | None]]) -> None:
    """Update the kept ratios with these medians."""
    kept = read_ratios(path) | {name: round(float(spread["median"] or 0), 3) for name, spread in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
