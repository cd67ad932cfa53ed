"""The recipe `tuned`: a search per method, selection on validation images, then many seeds, as `tuned.yaml` defines.

Trials are runs of the table like all others. They are drawn beforehand from a Halton sequence (Halton 1964), so that a
killed table resumes, machines can share it, and every method sees the same learning rates.
"""

import functools
import hashlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from tla_service.config import Method
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.yaml_files import read_yaml
from tla_service.errors import UnavailableError, readable
from tla_service.training.meter import ROBUST
from tla_service.training.output import SUMMARY
from tla_service.tuning.axes import axis_of
from tla_service.tuning.settings import Dimension

# Not among the seeds of the table, so that no seed that is reported took part in the selection.
_TRIAL_SEEDS = (1000, 1001)


class Arm(BaseModel, frozen=True, extra="forbid"):
    """A row of the table: a method with fixed fields, and the space that its search adds to the shared one."""

    method: Method
    fields: dict[str, Any] = Field({})
    space: dict[str, Dimension] = Field({})
    tuned_as: str | None = None  # takes the settings found for another arm instead of searching
    seeds: int | None = Field(None, exclude=True)  # none: those of the table; no part of `searches_digest`
    autoattack: bool = False


class Compared(BaseModel, frozen=True, extra="forbid"):
    """A difference between two arms, by measure, with what the authors claim for it in points, if they do."""

    row: str
    less: str
    measures: dict[str, float | None]


class Protocol(BaseModel, frozen=True, extra="forbid"):
    """How a table is tuned and measured."""

    preset: str
    flags: list[str]  # on top of the preset
    trials: int  # per arm, at one seed
    trial_fields: dict[str, Any] = Field({})  # of a trial in place of the run's, such as a shorter training
    repeated: int  # the best of them, at a second seed
    attacks: dict[str, EvaluationAttack]
    images: dict[str, int]  # of the test set; AutoAttack and representation only with the first `full_seeds` seeds
    full_seeds: int
    shared: dict[str, Dimension]
    arms: dict[str, Arm]
    comparisons: list[Compared]

    @property
    def searched(self) -> dict[str, Arm]:
        """The arms that have a search of their own."""
        return {name: arm for name, arm in self.arms.items() if arm.tuned_as is None}


_PROTOCOLS = TypeAdapter(dict[str, Protocol])


@functools.cache
def protocol(table: str) -> Protocol:
    """The protocol of a table."""
    return _PROTOCOLS.validate_python(read_yaml(Path(__file__).with_name("tuned.yaml"), "table"))[table]


def searches_digest(table: str) -> str:
    """Of all that decides what a numbered trial, or a run with its winner's settings, is and how it was measured."""
    found = protocol(table).model_dump_json(exclude={"comparisons", "full_seeds"})
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def trial_points(table: str, arm: str) -> list[dict[str, float]]:
    """The settings of an arm's trials; the shared ones are the same in the trials of every arm."""
    from scipy.stats import qmc

    found = protocol(table)
    axes = [axis_of(name, dimension) for name, dimension in (found.shared | found.arms[arm].space).items()]
    # Unscrambled, each dimension is a sequence of its own, whatever comes after it; the first point is all zeros.
    shares = qmc.Halton(len(axes), scramble=False).random(found.trials + 1)[1:]
    points = []
    for row in shares:
        values = (
            axis.low * (axis.high / axis.low) ** share if axis.log else axis.low + share * (axis.high - axis.low)
            for axis, share in zip(axes, row, strict=True)
        )
        points.append({axis.name: float(f"{value:.3g}") for axis, value in zip(axes, values, strict=True)})
    return points


@dataclass(frozen=True)
class Scored:
    """A trial: its number, its settings, and its validation accuracy under attack at each seed that has finished."""

    number: int
    point: dict[str, float]
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.scores)


def trial_name(arm: str, number: int, seed: int) -> str:
    """The name of a trial's run."""
    return f"{arm}-t{number}-s{seed}"


def scored_trials(table: str, arm: str, state: Path) -> list[Scored]:
    """The trials of an arm that have finished at the first seed at least."""
    found = []
    for number, point in enumerate(trial_points(table, arm)):
        paths = [state / trial_name(arm, number, seed) / SUMMARY for seed in _TRIAL_SEEDS]
        scores = [_score(path) for path in paths if path.exists()]
        if scores:
            found.append(Scored(number, point, tuple(scores)))
    return found


def _score(path: Path) -> float:
    with readable("state", path, "delete it to train the trial again"):
        return float(json.loads(path.read_text())["validation"][ROBUST])


def training_seconds(folder: Path) -> float:
    """What a run's training took, all phases; 0 of one that has not finished."""
    path = folder / SUMMARY
    with readable("state", path, "delete it to train the run again"):
        return sum(json.loads(path.read_text()).get("wall_seconds", {}).values()) if path.exists() else 0.0


def winner(table: str, arm: str, state: Path) -> Scored:
    """The best trial of an arm over two seeds, of equals the first; UnavailableError while trials are missing."""
    found = protocol(table)
    repeated = [trial for trial in scored_trials(table, arm, state) if len(trial.scores) == len(_TRIAL_SEEDS)]
    if len(repeated) < min(found.repeated, found.trials):
        raise UnavailableError("state", state, f"trials of {arm} are missing", "give the same command again")
    return max(repeated, key=lambda trial: trial.mean)


def first_trials(table: str) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Name, arm, seed and settings of every trial at the first seed, the arms by turns."""
    seed, points = _TRIAL_SEEDS[0], {arm: trial_points(table, arm) for arm in protocol(table).searched}
    for number in range(protocol(table).trials):
        for arm, each in points.items():
            yield trial_name(arm, number, seed), arm, seed, each[number]


def repeated_trials(table: str, state: Path) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Those of the best trials, of equals the first, at the second seed."""
    seed = _TRIAL_SEEDS[1]
    for arm in protocol(table).searched:
        trials = sorted(scored_trials(table, arm, state), key=lambda trial: trial.scores[0], reverse=True)
        for trial in trials[: protocol(table).repeated]:
            yield trial_name(arm, trial.number, seed), arm, seed, trial.point


def trial_deviation(table: str, state: Path) -> float | None:
    """The standard deviation of one trial's score over seeds, pooled over all repeated trials of all arms."""
    pairs = [
        trial.scores for arm in protocol(table).searched for trial in scored_trials(table, arm, state)
        if len(trial.scores) == len(_TRIAL_SEEDS)
    ]  # fmt: skip
    return statistics.mean((first - second) ** 2 / 2 for first, second in pairs) ** 0.5 if pairs else None
