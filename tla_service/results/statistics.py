"""Statistics over seeds: means with intervals, and methods compared seed by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tla_service.evaluation.results import CONFIDENCE, paired_difference
from tla_service.evaluation.shards import ShardOutcome, load_outcome
from tla_service.report.schema import AUTOATTACK_FILE, OUTCOME_FILE, REPORT_FILE, Report, read_report
from tla_service.results.runs import REPORT, TableRun, is_measured

AUTOATTACK = "autoattack"


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, over seeds or over the images of the only one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """A finished run: its report, and each image's result under the attacks and under AutoAttack."""

    run: TableRun
    report: Report
    outcomes: ShardOutcome
    autoattack: ShardOutcome | None

    def outcome(self, name: str) -> ShardOutcome | None:
        """The results under an attack; None if it was not run."""
        if name == AUTOATTACK:
            return self.autoattack
        return self.outcomes if name in self.outcomes.broken_at else None

    def figure(self, name: str) -> float | None:
        """A figure by name: an attack, `detection`, `neighbours clean`, `neighbours attacked`, `r EPS` or `r' EPS`.

        Accuracies are of all test images, as in the paper; the others leave out those set aside for the gate.
        """
        kind, _, rest = name.partition(" ")
        if kind == "detection":
            return None if self.report.detection is None else self.report.detection.auc
        if kind == "neighbours":
            votes = self.report.neighbours
            return None if votes is None else (votes.clean if rest == "clean" else votes.attacked).estimate
        if kind in ("r", "r'"):
            found = next((each for each in self.report.shift if f"{each.epsilon:.3g}" == rest), None)
            return None if found is None else found.r if kind == "r" else found.r_prime
        outcome = self.outcome(name)
        return None if outcome is None else float(outcome.standing(name).mean())


@dataclass(frozen=True)
class Row:
    """The finished runs of a method or a pool size, in the order of their seeds."""

    label: str
    runs: tuple[Measured, ...]

    def values(self, name: str) -> list[float]:
        """A figure of each run, as fractions, without the runs that lack it."""
        return [value for each in self.runs if (value := each.figure(name)) is not None]


def read_row(label: str, runs: Sequence[TableRun], state: Path) -> Row:
    """Read the finished ones of some runs.

    Raises:
        UnavailableError: A file is damaged.
    """
    found = []
    for run in runs:
        folder = state / run.name / REPORT
        if is_measured(state / run.name):
            strong = folder / AUTOATTACK_FILE
            autoattack = load_outcome(strong) if strong.exists() else None
            found.append(
                Measured(run, read_report(folder / REPORT_FILE), load_outcome(folder / OUTCOME_FILE), autoattack)
            )
    return Row(label, tuple(found))


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean and Student's t interval over seeds; of one seed there is no interval, of none nothing."""
    if not values:
        return None
    mean = statistics.mean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    from scipy.stats import t

    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - reach, mean + reach)


def shared_seeds(first: Row, second: Row) -> list[tuple[Measured, Measured]]:
    """Pairs of runs with equal seeds, which share split, order and initial weights."""
    other = {each.run.seed: each for each in second.runs}
    return [(each, other[each.run.seed]) for each in first.runs if each.run.seed in other]


def difference(first: Row, second: Row, name: str) -> Estimate | None:
    """First minus second, seed by seed.

    With one shared seed an accuracy's interval is over its images instead (Newcombe's, paired).
    """
    pairs = shared_seeds(first, second)
    values = [a - b for a, b in ((x.figure(name), y.figure(name)) for x, y in pairs) if a is not None and b is not None]
    outcomes = [each.outcome(name) for each in pairs[0]] if len(values) == len(pairs) == 1 else []
    match outcomes:
        case [ShardOutcome() as one, ShardOutcome() as two]:
            paired = paired_difference(one.standing(name), two.standing(name))
            return Estimate(paired.difference, paired.low, paired.high)
    return over_seeds(values)
