"""Statistics over seeds: means with intervals, and methods compared seed by seed."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tla_service.evaluation.intervals import CONFIDENCE, paired_difference
from tla_service.evaluation.outcomes import load_outcome
from tla_service.results.measure import AUTOATTACK, MEASURED, OUTCOME
from tla_service.results.runs import TableRun


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, over seeds or over the images of the only one."""

    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Row:
    """The finished runs of a method or a pool size, in the order of their seeds."""

    label: str
    runs: tuple[TableRun, ...]
    measured: tuple[dict[str, Any], ...]
    folders: tuple[Path, ...]

    def values(self, name: str) -> list[float]:
        """A figure of each run, as fractions, without the runs that lack it."""
        found = (figure(measured, name) for measured in self.measured)
        return [value for value in found if value is not None]


def read_row(label: str, runs: Sequence[TableRun], state: Path) -> Row:
    """The finished ones of some runs."""
    done = tuple(run for run in runs if (state / run.name / MEASURED).exists())
    folders = tuple(state / run.name for run in done)
    return Row(label, done, tuple(json.loads((folder / MEASURED).read_text()) for folder in folders), folders)


def figure(measured: dict[str, Any], name: str) -> float | None:
    """A figure by name: an attack, `detection`, `neighbours clean`, `neighbours attacked`, `r EPS` or `r' EPS`."""
    kind, _, rest = name.partition(" ")
    if kind == "detection":
        value = measured["detection"] and measured["detection"]["auc"]
    elif kind == "neighbours":
        value = measured["neighbours"] and measured["neighbours"][rest]["estimate"]
    elif kind in ("r", "r'"):
        field = "r" if kind == "r" else "r_prime"
        value = next((each[field] for each in measured["shift"] if f"{each['epsilon']:.3g}" == rest), None)
    else:
        value = measured["accuracy"].get(name, {}).get("estimate")
    return None if value is None else float(value)


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean and Student's t interval over seeds; of one seed there is no interval, of none nothing."""
    if not values:
        return None
    mean = statistics.mean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    from scipy.stats import t

    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - reach, mean + reach, len(values))


def difference(first: Row, second: Row, name: str) -> Estimate | None:
    """First less second, seed by seed: equal seeds share split, order and initial weights.

    With one seed in common an accuracy's interval is over its images instead (Newcombe's, paired).
    """
    other = {run.seed: place for place, run in enumerate(second.runs)}
    pairs = [(place, other[run.seed]) for place, run in enumerate(first.runs) if run.seed in other]
    found = [(figure(first.measured[a], name), figure(second.measured[b], name)) for a, b in pairs]
    values = [one - two for one, two in found if one is not None and two is not None]
    estimate = over_seeds(values)
    if len(values) != 1 or name.split()[0] in ("detection", "neighbours", "r", "r'"):
        return estimate
    file = AUTOATTACK if name == "autoattack" else OUTCOME
    one, two = (load_outcome(row.folders[place] / file) for row, place in zip((first, second), pairs[0], strict=True))
    paired = paired_difference(one.standing(name), two.standing(name))
    return Estimate(paired.difference, paired.low, paired.high, 1)
