"""Shards of images, and what is measured of them: a few arrays each, put together at the end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tla_service.data import Batch
from tla_service.evaluation.mode import as_pixels
from tla_service.evaluation.outcomes import Arrays, IntArray


@dataclass(frozen=True)
class Shard:
    """Images (N, C, H, W), uint8, labels and numbers in their set (N,), and networks on the device, in eval mode."""

    network: nn.Module
    surrogate: nn.Module | None
    images: Tensor
    labels: Tensor
    rows: IntArray
    device: torch.device

    def batches(self, size: int) -> Iterator[Batch]:
        """The images as float32 in [0, 1] on the device."""
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            yield Batch(as_pixels(self.images[part], self.device), self.labels[part].to(self.device))


class Measurement(Protocol):
    """Something measured shard by shard."""

    def run(self, shard: Shard) -> Arrays:
        """Measure one shard, maybe in a worker."""

    def merge(self, parts: Sequence[Arrays]) -> Any:
        """Put the shards together, in their order."""
