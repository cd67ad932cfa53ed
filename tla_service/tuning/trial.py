"""What is known of a trial: the only state that a sweep has. Searcher and scheduler are functions of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["running", "finished", "stopped", "failed"]
PREFIX = "validation/"


@dataclass
class Attempt:
    """One stay of a trial on the cluster. Times are seconds since 1970.

    Attributes:
        chosen: The trial was given to Ray Tune.
        began: Its own process began.
        trained: Its workers began to train; 0 until then.
        last_epoch: When its last epoch was told; 0 until then.
        last: Its last sign of life.
        ended: It gave its place free; 0 until then, and for ever if the driver was killed.
    """

    chosen: float
    began: float = 0.0
    trained: float = 0.0
    last_epoch: float = 0.0
    last: float = 0.0
    ended: float = 0.0


@dataclass
class Trial:
    """One trial.

    Attributes:
        number: 0, 1, ... in the order of choice.
        point: A value for each searched setting.
        status: `running` until it ended for good, over interruptions and resumptions too.
        reports: Metrics of each epoch that was validated: `epoch` and `validation/...`.
        attempts: When it ran.
        reason: Why it failed or was stopped.
        test: Accuracies on the test set, where the sweep measures them.
        wall_seconds: Time by phase of the last attempt, as workers measured it.
        restarts: How often its workers failed and were started again.
    """

    number: int
    point: dict[str, Any]
    status: Status = "running"
    reports: list[dict[str, float]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    reason: str = ""
    test: dict[str, float] = field(default_factory=dict)
    wall_seconds: dict[str, float] = field(default_factory=dict)
    restarts: int = 0

    def add_report(self, metrics: Mapping[str, float]) -> bool:
        """Take an epoch's metrics; False if it was not validated or is known already: a restart repeats epochs."""
        if f"{PREFIX}robust_accuracy" not in metrics or self.epochs_done > metrics["epoch"]:
            return False
        self.reports.append({name: value for name, value in metrics.items() if _is_kept(name)})
        return True

    @property
    def epochs_done(self) -> int:
        """Epochs up to the last report."""
        return int(self.reports[-1]["epoch"]) + 1 if self.reports else 0

    def best(self, epochs: float = float("inf")) -> dict[str, float] | None:
        """The best report of the first so many epochs, as training chooses its best weights; None without any."""
        within = [report for report in self.reports if report["epoch"] + 1 <= epochs]
        return max(within, key=_rank, default=None)

    def value(self, objective: str, epochs: float = float("inf")) -> float | None:
        """An objective at the best report of the first so many epochs."""
        found = self.best(epochs)
        return None if found is None else found[f"{PREFIX}{objective}"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Trial":
        """The trial that `as_dict` gave."""
        attempts = [Attempt(**attempt) for attempt in fields["attempts"]]
        return cls(**{**fields, "attempts": attempts})


def winner(trials: Sequence[Trial], objective: str) -> Trial | None:
    """The trial with the best value; finished ones before others, the first of equals; None if none has any."""
    ended = [trial for trial in trials if trial.status == "finished" and trial.reports]
    among = ended or [trial for trial in trials if trial.status != "failed" and trial.reports]
    other = "clean_accuracy" if objective == "robust_accuracy" else "robust_accuracy"
    return max(among, key=lambda trial: (trial.value(objective), trial.value(other)), default=None)


def _is_kept(name: str) -> bool:
    return name in ("epoch", "train/loss", f"{PREFIX}robust_accuracy", f"{PREFIX}clean_accuracy")


def _rank(report: Mapping[str, float]) -> tuple[float, float, float]:
    return report[f"{PREFIX}robust_accuracy"], report[f"{PREFIX}clean_accuracy"], -report["epoch"]
