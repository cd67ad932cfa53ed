"""Sums over an epoch, kept on the device and read at intervals, on all workers together."""

import math
import time

import torch
from torch import Tensor

from tla_service.runtime import WorkerContext, all_reduce_sum
from tla_service.training.step import METRIC_NAMES, TOTALS


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; a retry would end the same."""


class Meter:
    """Adds up `step.TOTALS` over steps and workers, on top of an epoch's sums before a restart."""

    def __init__(self, context: WorkerContext, partial_totals: list[float] | None = None) -> None:
        self._context = context
        # The last entry transports a stop request, so that all workers stop at the same step.
        self._window = torch.zeros(len(TOTALS) + 1, dtype=torch.float64, device=context.device)
        self.epoch_totals = list(partial_totals or [0.0] * len(TOTALS))
        self.stop_requested = False
        self._begin = time.perf_counter()
        self._images_before = self.epoch_totals[-1]

    def add(self, totals: Tensor) -> None:
        """Add a step's sums (len(TOTALS),); does not wait for the device."""
        self._window[:-1] += totals

    def reduce(self, step: int, *, stop_requested: bool) -> None:
        """Sum over all workers what was added since the last call, and read it: the only wait for the device.

        Raises:
            NonFiniteLossError: A loss of this epoch was NaN or infinite; on all workers alike.
        """
        self._window[-1] = float(stop_requested)
        *totals, stop = all_reduce_sum(self._window, self._context).tolist()
        self.epoch_totals = [old + new for old, new in zip(self.epoch_totals, totals, strict=True)]
        self.stop_requested = stop > 0
        self._window.zero_()
        if not math.isfinite(self.epoch_totals[0]):
            message = f"the loss is not finite by step {step}; lower optimizer.learning_rate or set optimizer.grad_clip"
            raise NonFiniteLossError(message)

    @property
    def means(self) -> dict[str, float]:
        """Means over the epoch's images so far."""
        sums = dict(zip(TOTALS, self.epoch_totals, strict=True))
        images = max(1.0, sums["images"])
        return {metric: sums[name] / images for name, metric in METRIC_NAMES.items()}

    @property
    def images_per_second(self) -> float:
        """Images trained on per second, over all workers, since the epoch began or resumed here."""
        return (self.epoch_totals[-1] - self._images_before) / (time.perf_counter() - self._begin)
