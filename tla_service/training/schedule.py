"""The learning rate as a pure function of the step, so that nothing need be saved to resume."""

import math
from itertools import takewhile

from tla_service.config.training import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """What the starting learning rate is multiplied by.

    Args:
        schedule: Shape, milestones and warm-up.
        step: Optimiser step, from 0.
        steps_per_epoch: Steps in an epoch.
        total_steps: Steps in the whole run.

    Returns:
        A factor in [0, 1].
    """
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
