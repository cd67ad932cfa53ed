"""The optimizer and its learning rate."""

import math
from itertools import takewhile

from torch import nn, optim

from tla_service.config import RunConfig
from tla_service.config.sections import ScheduleConfig


def build_optimizer(network: nn.Module, run: RunConfig) -> optim.Optimizer:
    """The run's optimizer, with weight decay on kernels only or on all parameters."""
    config, fused = run.optimizer, run.speed.fused_optimizer
    # Kernels have two or more dimensions; biases and BatchNorm's scales have one.
    kernels = [p for p in network.parameters() if p.ndim > 1 or config.decay == "all"]
    others = [p for p in network.parameters() if p.ndim <= 1 and config.decay != "all"]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    if config.name == "sgd":
        momentum, nesterov = config.momentum, config.nesterov
        return optim.SGD(groups, lr=config.learning_rate, momentum=momentum, nesterov=nesterov, fused=fused)
    kind = optim.AdamW if config.name == "adamw" else optim.Adam
    return kind(groups, lr=config.learning_rate, betas=(config.momentum, 0.999), fused=fused)


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Factor in [0, 1] on the learning rate at a step (from 0), a pure function of it: resuming needs no state."""
    unit = steps_per_epoch if schedule.unit == "epoch" else 1
    warmup = min(1.0, (step + 1) / (schedule.warmup * unit)) if schedule.warmup else 1.0
    progress = step / max(1, total_steps)
    match schedule.name:
        case "constant":
            shape = 1.0
        case "piecewise":
            passed = list(takewhile(lambda milestone: milestone * unit <= step, schedule.milestones))
            shape = schedule.factor ** len(passed)
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        case "cyclic":
            rising = progress < schedule.peak
            shape = progress / schedule.peak if rising else (1 - progress) / (1 - schedule.peak)
    return warmup * shape
