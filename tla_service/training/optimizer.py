"""The optimizer and its learning rate."""

import math
from typing import Any

from torch import optim

from tla_service.config import RunConfig
from tla_service.config.training import ScheduleConfig
from tla_service.models import ImageClassifier

_RATE = "rate"  # of a group of parameters: its factor on the learning rate


def build_optimizer(network: ImageClassifier, run: RunConfig) -> optim.Optimizer:
    """The run's optimizer, with weight decay on kernels only or on all parameters, and a slower body if asked."""
    config, fused = run.optimizer, run.speed.fused_optimizer
    # Kernels have two or more dimensions; biases and BatchNorm's scales have one.
    kernels = [p for p in network.parameters() if p.ndim > 1 or config.decay == "all"]
    others = [p for p in network.parameters() if p.ndim <= 1 and config.decay != "all"]
    groups: list[dict[str, Any]] = [{"params": kernels, "weight_decay": config.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    if config.body_rate != 1:
        head = set(network.classifier.parameters())
        parts = [(1.0, head), (config.body_rate, set(network.parameters()) - head)]
        groups = [
            {**group, "params": [p for p in group["params"] if p in part], _RATE: rate}
            for rate, part in parts
            for group in groups
        ]
        groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        momentum, nesterov = config.momentum, config.nesterov
        return optim.SGD(groups, lr=config.learning_rate, momentum=momentum, nesterov=nesterov, fused=fused)
    kind = optim.AdamW if config.name == "adamw" else optim.Adam
    return kind(groups, lr=config.learning_rate, betas=(config.momentum, 0.999), fused=fused)


def set_learning_rate(optimizer: optim.Optimizer, rate: float) -> None:
    """Set the learning rate; the body's is its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_RATE, 1.0)


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Factor in [0, 1] on the learning rate at a step (from 0), a pure function of it: resuming needs no state."""
    unit = steps_per_epoch if schedule.unit == "epoch" else 1
    warmup = min(1.0, (step + 1) / (schedule.warmup * unit)) if schedule.warmup else 1.0
    progress = step / max(1, total_steps)
    match schedule.name:
        case "constant":
            shape = 1.0
        case "piecewise":
            shape = schedule.factor ** sum(milestone * unit <= step for milestone in schedule.milestones)
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        case "cyclic":
            rising = progress < schedule.peak
            shape = progress / schedule.peak if rising else (1 - progress) / (1 - schedule.peak)
        case "one_cycle":
            # torch's OneCycleLR with its default divisors, but not its cycle of the momentum.
            top = schedule.peak * total_steps - 1
            rising = step < top
            share = step / top if rising else (step - top) / (total_steps - 1 - top)
            start, end = (1 / 25, 1.0) if rising else (1.0, 1 / (25 * 1e4))
            shape = end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
    return warmup * shape
