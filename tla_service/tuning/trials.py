"""Trials: what one reports while it trains, and what is known of all: the winner, the table, and Optuna's study."""

import csv
import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from tla_service.tuning.settings import Objective
from tla_service.tuning.space import Point, Space

if TYPE_CHECKING:
    import optuna

STUDY = "sweep"
Status = Literal["running", "finished", "stopped", "failed"]
Outcome = Literal["running", "finished", "failed", "unavailable"]
_SHOWN: dict[Status, str] = {
    "finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "unfinished",
}  # fmt: skip


class Score(NamedTuple):
    """Validation accuracies after a number of epochs."""

    epochs: int
    robust_accuracy: float
    clean_accuracy: float


def best_of(curve: Sequence[Score], selected_by: Objective) -> Score | None:
    """The best score, chosen as training chooses its best weights; None if the curve is empty."""
    key = attrgetter(selected_by, "robust_accuracy", "clean_accuracy")
    return max(curve, key=key, default=None)  # the first of equals


class Progress:
    """Turns the records of a training run into the reports of its trial, of which each describes the whole trial."""

    def __init__(self) -> None:
        self.selected_by: Objective = "robust_accuracy"  # of the run
        self._curve: list[Score] = []
        self._metrics: list[Mapping[str, float]] = []  # not reported yet
        self._epochs = self._total_epochs = self._restarts = 0
        self._began: float | None = None

    def add(self, record: Mapping[str, Any]) -> str | None:
        """Add a record of `fit_on_ray`; returns a message, possibly empty, or None if there is nothing to report."""
        match record["event"]:
            case "placed":
                self._began = self._began or time.monotonic()
                return ""
            case "start":
                self._total_epochs = record["epochs"]
                self.add_history(record["history"])
                return "resumes from its last checkpoint" if record["resumed"] else "starts training"
            case "epoch":
                before = len(self._curve)
                self.add_history([record["metrics"]])
                return "" if len(self._curve) > before else None
            case "failure":
                self._restarts += 1
        return record.get("message")

    def add_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Add the metrics of epochs; known ones, repeated after a restart, are left out."""
        for metrics in history:
            epochs = int(metrics["epoch"]) + 1
            if epochs <= self._epochs:
                continue
            self._epochs = epochs
            self._metrics.append(metrics)
            if "validation/robust_accuracy" in metrics:
                robust, clean = metrics["validation/robust_accuracy"], metrics["validation/clean_accuracy"]
                self._curve.append(Score(epochs, robust, clean))

    def report(
        self,
        message: str = "",
        outcome: Outcome = "running",
        reason: str = "",
        test: Mapping[str, float] | None = None,
        error: Sequence[Any] = (),
    ) -> dict[str, Any]:
        """The next report: plain values for `tune.report`; `unavailable` trials have the arguments of an `error`.

        Accuracies are those of the best score so far, 0 before the first validation and for a failed trial. A failed
        trial has 0 epochs, so that the scheduler compares no other with it.
        """
        best = best_of(self._curve, self.selected_by) if outcome in ("running", "finished") else None
        metrics, self._metrics = self._metrics, []
        return {
            "epochs": self._curve[-1].epochs if best is not None else 0,
            "total_epochs": self._total_epochs,
            "robust_accuracy": 0.0 if best is None else best.robust_accuracy,
            "clean_accuracy": 0.0 if best is None else best.clean_accuracy,
            "curve": [list(score) for score in self._curve],
            "selected_by": self.selected_by,
            "metrics": [dict(each) for each in metrics],
            "worker_seconds": 0.0 if self._began is None else time.monotonic() - self._began,
            "restarts": self._restarts,
            "message": message,
            "outcome": outcome,
            "reason": reason,
            "test": dict(test or {}),
            "error": list(error),
        }


@dataclass
class Trial:
    """What is known of a trial."""

    number: int  # 0, 1, ... in the order of suggestion
    point: Point
    status: Status = "running"  # or interrupted
    curve: list[Score] = field(default_factory=list)
    selected_by: Objective = "robust_accuracy"  # what chooses the best score, as it chooses the run's best weights
    reason: str = ""  # why it was stopped or failed
    test: dict[str, float] = field(default_factory=dict)  # accuracies on the test set, if the sweep measures them
    restarts: int = 0  # of its workers
    attempts: int = 0  # at the sweep that ran it
    seconds: float = 0.0  # wall time of its process, over all attempts, up to the last report of each
    worker_seconds: float = 0.0  # wall time of its workers, likewise

    def add_attempt(self, report: Mapping[str, Any], deaths: int = 0) -> None:
        """Add an attempt: its last report, with what Ray Tune adds, and how often its process died if that ended it."""
        self.attempts += 1
        if "outcome" in report:
            self.curve = [Score(*each) for each in report["curve"]] or self.curve
            self.selected_by = report.get("selected_by", self.selected_by)  # an older version's lack it
            outcome: Outcome = report["outcome"]
            self.status = "running" if outcome == "unavailable" else outcome
            self.reason, self.test = report["reason"], dict(report["test"])
            self.restarts += report["restarts"]
            self.seconds += report["time_total_s"]
            self.worker_seconds += report["worker_seconds"]
            if outcome == "running" and report.get("done"):
                self.status, self.reason = "stopped", f"behind the others after epoch {self.epochs - 1}"
        if deaths and self.status == "running":
            self.status, self.reason = "failed", f"its process died {deaths} times (killed, or its node was lost)"

    @property
    def epochs(self) -> int:
        """Epochs up to the last validation."""
        return self.curve[-1].epochs if self.curve else 0

    @property
    def best(self) -> Score | None:
        """The best score; None before the first validation."""
        return best_of(self.curve, self.selected_by)

    @property
    def best_accuracies(self) -> dict[str, float]:
        """The accuracies of the best score by name; empty before the first validation."""
        return {} if self.best is None else {name: getattr(self.best, name) for name in get_args(Objective)}

    def value(self, objective: Objective) -> float | None:
        """An objective at the best score; None before the first validation."""
        return self.best_accuracies.get(objective)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"curve": [score._asdict() for score in self.curve]}


def winner(trials: Sequence[Trial], objective: Objective) -> Trial | None:
    """The trial with the best value; finished ones before others, the first of equals; None if none has any."""
    ended = [trial for trial in trials if trial.status == "finished" and trial.curve]
    among = ended or [trial for trial in trials if trial.status != "failed" and trial.curve]
    other: Objective = "clean_accuracy" if objective == "robust_accuracy" else "robust_accuracy"
    return max(among, key=lambda trial: (trial.value(objective), trial.value(other)), default=None)


def table(trials: Sequence[Trial], space: Space) -> list[dict[str, Any]]:
    """One row per trial: number, status, point, best validation accuracies, epochs, times."""
    return [
        {
            "trial": trial.number,
            "status": trial.status,
            **{axis.name: trial.point[axis.name] for axis in space.axes},
            **{f"validation/{name}": value for name, value in trial.best_accuracies.items()},
            **{f"test/{name}": value for name, value in trial.test.items()},
            "best_epoch": None if trial.best is None else trial.best.epochs - 1,
            "epochs": trial.epochs,
            "attempts": trial.attempts,
            "restarts": trial.restarts,
            "seconds": round(trial.seconds, 1),
            "reason": trial.reason,
        }
        for trial in trials
    ]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as comma-separated values."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def counts(trials: Sequence[Trial]) -> str:
    """How many trials have which status."""
    numbers = Counter(trial.status for trial in trials)
    told = ", ".join(f"{numbers[status]} {name}" for status, name in _SHOWN.items() if numbers[status])
    return f"{len(trials)} trials: {told}" if told else "no trials"


def study_of(
    space: Space,
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    storage: "optuna.storages.BaseStorage | None" = None,
) -> "optuna.Study":
    """The trials as a study in which all are complete; one that failed, or has no validation, counts as 0."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    maximize = optuna.study.StudyDirection.MAXIMIZE
    study = optuna.create_study(directions=[maximize] * len(objectives), storage=storage, study_name=STUDY)
    axes = distributions(space)
    for trial in trials:
        values = [0.0 if trial.status == "failed" else trial.value(name) or 0.0 for name in objectives]
        params = to_params(space, trial.point)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=axes, values=values))
    return study


def sampler_of(space: Space, num_before: int) -> "optuna.samplers.BaseSampler":
    """Optuna's sampler; seeded by the number of trials before this attempt too, so that it draws other numbers."""
    import optuna

    seed = int(np.random.SeedSequence([space.sweep.seed, num_before]).generate_state(1)[0])
    if space.sweep.searcher == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # Running trials count as bad for the time being, so that parallel ones do not try the same.
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=space.sweep.startup_trials, multivariate=True, constant_liar=True
    )


def distributions(space: Space) -> "dict[str, optuna.distributions.BaseDistribution]":
    """Optuna's distribution of each axis."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for axis in space.axes:
        if axis.choices:
            found[axis.name] = CategoricalDistribution([_param(choice) for choice in axis.choices])
        else:
            low, high = axis.ends()
            found[axis.name] = (IntDistribution if axis.whole else FloatDistribution)(low, high, log=axis.log)
    return found


def to_params(space: Space, point: Point) -> dict[str, Any]:
    """A point as Optuna's parameters."""
    return {axis.name: _param(point[axis.name]) for axis in space.axes}


def to_point(space: Space, params: dict[str, Any]) -> Point:
    """The point of Optuna's parameters."""
    return {
        axis.name: next((choice for choice in axis.choices if _param(choice) == params[axis.name]), params[axis.name])
        for axis in space.axes
    }


def _param(value: Any) -> Any:
    """A value as Optuna takes it: numbers and text as they are, lists and the like as text."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)
