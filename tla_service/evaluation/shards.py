"""Shards of images, what is measured of them, and what every evaluation runs in: eval mode and float32."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tla_service.attacks import LogitsFn
from tla_service.data import Batch
from tla_service.data.augmentation import to_unit
from tla_service.evaluation.outcomes import Arrays, IntArray
from tla_service.runtime import autocast


@contextlib.contextmanager
def float32(device: torch.device) -> Iterator[None]:
    """Compute in full float32: neither autocast nor the 19-bit TF32 that GPUs otherwise use in convolutions.

    cuDNN does not time its kernels meanwhile (`speed.tune_kernels`): restarts attack fewer and fewer images, and every
    new batch size would be timed again.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = False
    try:
        with autocast("float32", device):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


@contextlib.contextmanager
def evaluating(*networks: nn.Module | None) -> Iterator[None]:
    """Put networks in eval mode; afterwards every module is in the mode it was in, frozen ones too."""
    given = [network for network in networks if network is not None]
    before = [(module, module.training) for network in given for module in network.modules()]
    for network in given:
        network.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def logits_of(network: nn.Module) -> LogitsFn:
    """A network's logits as a function of images."""
    return lambda images: network(images).logits


def as_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Images as float32 in [0, 1] on the device; uint8 counts to 255."""
    images = images.to(device)
    return to_unit(images) if images.dtype == torch.uint8 else images.float()


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
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield Batch(as_pixels(images, self.device), labels.to(self.device))


class Measurement(Protocol):
    """Something measured shard by shard."""

    def run(self, shard: Shard) -> Arrays:
        """Measure one shard, maybe in a worker."""

    def merge(self, parts: Sequence[Arrays]) -> Any:
        """Put the shards together, in their order."""
