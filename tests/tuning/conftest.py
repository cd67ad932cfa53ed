"""Small sweeps on digits, and trials that reached what they are told to."""

from collections.abc import Mapping, Sequence
from typing import Any

from tla_service.config import RunConfig
from tla_service.tuning.settings import SweepConfig
from tla_service.tuning.space import Space
from tla_service.tuning.trials import Score, Status, Trial


def run_config(**changes: Any) -> RunConfig:
    fields: dict[str, Any] = {"training": {"epochs": 27, "global_batch_size": 64}}
    return RunConfig.model_validate(fields | changes)


def space_of(space: Mapping[str, Any] | None = None, *, run: RunConfig | None = None, **sweep: Any) -> Space:
    settings = SweepConfig.model_validate({"space": space or {}, **sweep})
    return Space(run or run_config(), settings)


def trial_of(
    number: int, robust: Sequence[float], *, point: Mapping[str, Any] | None = None, status: Status = "running"
) -> Trial:
    """A trial with a validation after each epoch."""
    curve = [Score(index + 1, value, 1 - value / 2) for index, value in enumerate(robust)]
    return Trial(number, dict(point or {}), status, curve)
