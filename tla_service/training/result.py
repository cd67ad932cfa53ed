"""The result of a run, and its wall time by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy.typing as npt


@dataclass
class FitResult:
    """The result of a run, in plain values: it crosses process boundaries.

    Attributes:
        interrupted: Whether a stop was requested; the run can resume from its last checkpoint.
        test: Accuracies of the best weights on the test set; empty if interrupted or not requested.
        best: Metrics of the epoch of the best weights.
        history: Metrics of every epoch.
        wall_seconds: Time by phase on rank 0.
        facts: Data set fingerprint and sizes, workers, device.
        rejector: Arrays of a :class:`tla_service.inference.detector.Rejector`; empty if not requested or not fitted.
    """

    interrupted: bool
    test: dict[str, float]
    best: dict[str, float]
    history: list[dict[str, float]]
    wall_seconds: dict[str, float]
    facts: dict[str, str] = field(default_factory=dict)
    rejector: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)


class Phases:
    """Adds up wall time by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of a block towards a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
