"""Optimisers."""

from torch import nn, optim

from tla_service.config import RunConfig


def build_optimizer(network: nn.Module, run: RunConfig) -> optim.Optimizer:
    """The run's optimiser, with weight decay on kernels only or on everything; fused where `speed` asks for it."""
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
