"""A small run on real digits, and a reporter that keeps everything in memory and on disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tla_service.config import RunConfig
from tla_service.data import Batch, StepBatch
from tla_service.runtime import WorkerContext, generator
from tla_service.training.checkpoint import LocalCheckpoint
from tla_service.training.fit import Run
from tla_service.training.output import FitResult
from tla_service.training.step import TrainingStep

IMAGES = 24


def digits_config(**changes: Mapping[str, Any] | Any) -> RunConfig:
    """A run of seconds; `changes` are sections or top-level fields."""
    fields: dict[str, Any] = {
        "data": {"name": "digits", "train_limit": 200, "test_limit": 50},
        "model": {"name": "digits_cnn"},
        "attack": {"epsilon": 0.15, "step_size": 0.05, "num_steps": 2},
        "optimizer": {"name": "adam", "learning_rate": 0.003},
        "training": {"epochs": 4, "global_batch_size": 50, "log_every_steps": 2},
        "evaluation": {"validation": {"num_steps": 2}, "test": {"pgd2": {"num_steps": 2}}},
    }
    for name, value in changes.items():
        fields[name] = fields.get(name, {}) | value if isinstance(value, Mapping) else value
    return RunConfig.model_validate(fields)


def random_batch(
    count: int = IMAGES, *, classes: int = 4, seed: int = 0, pool: int = 0, dtype: torch.dtype = torch.float64
) -> StepBatch:
    """Random 8x8 images with random labels; every class occurs."""
    draws = torch.Generator().manual_seed(seed)

    def batch(size: int, labels: torch.Tensor | None = None) -> Batch:
        images = torch.rand(size, 1, 8, 8, generator=draws, dtype=dtype)
        own = torch.randperm(size, generator=draws) % classes if labels is None else labels
        return Batch(images, own)

    anchors = batch(count)
    return StepBatch(anchors, batch(count, anchors.labels), batch(pool) if pool else None, count)


def loss_of(step: TrainingStep, batch: StepBatch, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, with a graph, and its sums: what `backward` differentiates."""
    random = generator(torch.device("cpu"), seed)
    adversarial = None if step.config.method == "natural" else step.adversary.craft(batch.anchors, random)
    return step.objective(batch, adversarial, random)


def fit(config: RunConfig, context: WorkerContext, reporter: Any) -> FitResult:
    """A run from its start to its end."""
    run = Run(config, context, reporter)
    run.start(None)
    return run.train()


def weights_of(checkpoint: Path) -> dict[str, bytes]:
    """Its files of weights: the network's, and where it has them the best and the average ones."""
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


def without_speed(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What epochs were, but not how fast."""
    return [{name: value for name, value in epoch.items() if name != "images_per_second"} for epoch in history]


class KeepingReporter:
    """Keeps reports and checkpoints; asks for a stop after a number of steps, if told to.

    Args:
        folder: Where checkpoints go.
        stop_after: Ask for a stop when this many step records have come.
        resume_from: Checkpoint to resume from.
    """

    def __init__(self, folder: Path, stop_after: int | None = None, resume_from: Path | None = None) -> None:
        self.folder, self.stop_after, self.resume_from = folder, stop_after, resume_from
        self.records: list[Mapping[str, Any]] = []
        self.metrics: list[dict[str, float]] = []
        self.checkpoints: list[Path] = []

    def progress(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def stored(self) -> list[LocalCheckpoint]:
        return [] if self.resume_from is None else [LocalCheckpoint(str(self.resume_from))]

    def destination(self, name: str) -> Path:
        return self.folder / name

    def report(self, metrics: dict[str, float] | None, checkpoint: Path | None, name: str) -> None:
        if metrics is not None:
            self.metrics.append(metrics)
        if checkpoint is not None:
            assert checkpoint == self.destination(name)
            self.checkpoints.append(checkpoint)

    def save_requested(self) -> bool:
        return False

    def stop_requested(self) -> bool:
        steps = sum(record["event"] == "step" for record in self.records)
        return self.stop_after is not None and steps >= self.stop_after


@pytest.fixture
def reporter(tmp_path: Path) -> KeepingReporter:
    return KeepingReporter(tmp_path)


@pytest.fixture
def new_reporter(tmp_path: Path) -> Callable[..., KeepingReporter]:
    made = []

    def make(**arguments: Any) -> KeepingReporter:
        folder = tmp_path / f"reporter-{len(made)}"
        folder.mkdir()
        made.append(KeepingReporter(folder, **arguments))
        return made[-1]

    return make
