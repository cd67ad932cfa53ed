"""What steps wait for a checkpoint, as a share of the default time from one to the next."""

import tempfile
from pathlib import Path

import torch

from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.timing import Spread, take_turns
from benchmarks.workloads import CLASSES
from tla_service.config import RunConfig
from tla_service.models import build_model
from tla_service.training.average import WeightAverage
from tla_service.training.checkpoint import TrainingState, cpu_weights, save_checkpoint

_NETWORKS = ("preact_resnet_18", "wrn_34_10")


def measure_checkpoints(settings: BenchmarkSettings, results: Results) -> None:
    """Checkpoints with momentum, average and best weights; what is uploaded afterwards, no step waits for."""
    rows = []
    for name in _NETWORKS:
        config = RunConfig.model_validate({"data": {"name": "cifar10", "root": "synthetic"}, "model": {"name": name}})
        seconds, size = _save(_state(config), config, settings.rounds)
        share = seconds.median / (60 * config.training.checkpoint_minutes)
        rows.append([name, f"{size / 1e6:.0f}", str(seconds), f"{share:.2%}"])
    results.table("Checkpoints", ["network", "MB", "s (quartiles)", "of the time from one to the next"], rows)


def _state(config: RunConfig) -> TrainingState:
    network = build_model(config.model.name, CLASSES, (3, 32, 32))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the momentum
    average = WeightAverage(network, 0.999)
    return TrainingState(network, optimizer, average, best_weights=cpu_weights(average.module))


def _save(state: TrainingState, config: RunConfig, rounds: int) -> tuple[Spread, int]:
    """Seconds of one checkpoint, and its bytes."""
    with tempfile.TemporaryDirectory(prefix="tla-benchmark-") as folder:
        target = Path(folder, "checkpoint")
        times = take_turns({"": lambda: save_checkpoint(target, state, config, {})}, rounds=rounds)
        return times.seconds(""), sum(path.stat().st_size for path in target.iterdir())
