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
from tla_service.training.optimizer import build_optimizer

_NETWORKS = ("preact_resnet_18", "wrn_34_10")
_BAR = 0.02


def measure_checkpoints(settings: BenchmarkSettings, results: Results) -> None:
    """Checkpoints with momentum, average and best weights; what is uploaded afterwards, no step waits for."""
    rows = []
    for name in _NETWORKS:
        config = RunConfig.model_validate(
            {
                "data": {"name": "cifar10", "root": "synthetic"},
                "model": {"name": name},
                "optimizer": {"name": "sgd"},
                "training": {"ema_decay": 0.999},
            }
        )
        network = build_model(name, CLASSES, (3, 32, 32))
        optimizer = build_optimizer(network, config)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the momentum
        average = WeightAverage(network, 0.999)
        state = TrainingState(network, optimizer, average, best_weights=cpu_weights(average.module))
        with tempfile.TemporaryDirectory(prefix="tla-benchmark-") as folder:
            target = Path(folder, "checkpoint")
            times = take_turns({name: lambda: save_checkpoint(target, state, config, {})}, rounds=settings.rounds)
            size = sum(path.stat().st_size for path in target.iterdir())
        seconds = times.seconds(name)
        share = Spread(*(each / (60 * config.training.checkpoint_minutes) for each in seconds))
        rows.append([name, f"{size / 1e6:.0f}", str(seconds), f"{share.median:.2%}"])
        results.ratio(f"cpu {name}: checkpoint, over the time from one to the next", share, _BAR)
    results.table("Checkpoints", ["network", "MB", "s (quartiles)", "of the time from one to the next"], rows)
