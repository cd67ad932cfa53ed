"""What came out of a sweep: the table of trials, and what it cost to start and to end them."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tla_service.tuning.space import Space
from tla_service.tuning.trial import Attempt, Trial

EXAMPLE_SECONDS = 300.0
STATUSES = ("finished", "stopped", "failed", "running")


@dataclass(frozen=True)
class Overhead:
    """Where the time of a sweep's places went, in this attempt.

    Attributes:
        slots: Trials at a time.
        wall_seconds: From the first choice to the last end.
        busy_share: Share of slots x wall time in which workers trained and validated.
        start_seconds: Median, from a place being free until the next trial's workers train there, setting up included.
        end_seconds: Median, from a trial's last epoch until its place is free.
        busy_share_of_five_minutes: What these costs would leave of trials of 5 minutes.
    """

    slots: int
    wall_seconds: float
    busy_share: float
    start_seconds: float
    end_seconds: float
    busy_share_of_five_minutes: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def table(trials: Sequence[Trial], space: Space) -> list[dict[str, Any]]:
    """One row a trial: number, status, point, best validation accuracies, epochs, times."""
    return [_row(trial, space) for trial in trials]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The table as comma-separated values."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def told_counts(trials: Sequence[Trial]) -> str:
    """How many trials have which status, in words."""
    numbers = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    words = {"running": "under way", "stopped": "stopped early"}
    told = [f"{number} {words.get(status, status)}" for status, number in numbers.items() if number]
    return f"{len(trials)} trials: {', '.join(told)}" if told else "no trials"


def overhead(trials: Sequence[Trial], slots: int, since: float) -> Overhead | None:
    """Where the time went since a moment; None if no trial has trained since.

    Args:
        trials: All trials.
        slots: Trials at a time.
        since: Seconds since 1970: when this attempt began.
    """
    stays = [(trial, stay) for trial in trials for stay in trial.attempts if stay.chosen >= since and stay.trained]
    if not stays:
        return None
    # Workers load data and build the network before they train; only trials that finished have told how long.
    told = [trial.wall_seconds["data"] + trial.wall_seconds["build"] for trial, _ in stays if trial.wall_seconds]
    setting_up = statistics.median(told) if told else 0.0
    busy = [max(0.0, _last_epoch(stay) - stay.trained - setting_up) for _, stay in stays]
    start = statistics.median(trained + setting_up - free for trained, free in _starts([s for _, s in stays], slots))
    ends = [stay.ended - _last_epoch(stay) for _, stay in stays if stay.ended]
    end = statistics.median(ends) if ends else 0.0
    wall = max(stay.ended or stay.last for _, stay in stays) - min(stay.chosen for _, stay in stays)
    share = EXAMPLE_SECONDS / (EXAMPLE_SECONDS + start + end)
    return Overhead(slots, wall, sum(busy) / max(1e-9, slots * wall), start, end, share)


def _starts(stays: Sequence[Attempt], slots: int) -> list[tuple[float, float]]:
    """When each trial's workers began to train, and since when there was a place for them and they were wanted.

    The first trials take the places that are there, each later one the place of one that ended: with as many places as
    `slots`, the n-th to begin takes that of the (n - slots)-th to end. A trial may have been waiting for it on deck.
    """
    trained = sorted((stay.trained, stay.chosen) for stay in stays)
    ends = sorted(stay.ended for stay in stays if stay.ended)
    found = []
    for index, (began, chosen) in enumerate(trained):
        before = index - slots
        free = ends[before] if 0 <= before < len(ends) else chosen
        found.append((began, max(free, chosen)))
    return found


def _last_epoch(stay: Attempt) -> float:
    return stay.last_epoch or stay.trained


def _row(trial: Trial, space: Space) -> dict[str, Any]:
    best = trial.best()
    accuracies = {name: value for name, value in (best or {}).items() if name.startswith("validation/")}
    return {
        "trial": trial.number,
        "status": trial.status,
        **{axis.name: trial.point[axis.name] for axis in space.axes},
        **accuracies,
        **{f"test/{name}": value for name, value in trial.test.items()},
        "best_epoch": None if best is None else int(best["epoch"]),
        "epochs": trial.epochs_done,
        "attempts": len(trial.attempts),
        "restarts": trial.restarts,
        "seconds": round(sum((stay.ended or stay.last) - stay.chosen for stay in trial.attempts), 1),
        "reason": trial.reason,
    }
