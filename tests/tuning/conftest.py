"""Small sweeps on digits, and trials that reached what they are told to."""

from collections.abc import Mapping, Sequence
from typing import Any

from tla_service.config import RunConfig
from tla_service.tuning.settings import SweepConfig
from tla_service.tuning.space import Space
from tla_service.tuning.trials import Status, Trial


def run_config(**changes: Any) -> RunConfig:
    fields: dict[str, Any] = {"training": {"epochs": 27, "global_batch_size": 64}}
    return RunConfig.model_validate(fields | changes)


def space_of(space: Mapping[str, Any] | None = None, *, run: RunConfig | None = None, **sweep: Any) -> Space:
    settings = SweepConfig.model_validate({"space": space or {}, **sweep})
    return Space(run or run_config(), settings)


def trial_of(
    number: int,
    robust: Sequence[float],
    *,
    point: Mapping[str, Any] | None = None,
    status: Status = "running",
    every: int = 1,
) -> Trial:
    """A trial with one report every so many epochs."""
    trial = Trial(number, dict(point or {}), status)
    for index, value in enumerate(robust):
        epoch = float((index + 1) * every - 1)
        assert trial.add_report(
            {"epoch": epoch, "validation/robust_accuracy": value, "validation/clean_accuracy": 1 - value / 2}
        )
    return trial
