"""What every evaluation runs on: eval mode, float32 whatever the process's settings, logits, images as pixels."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tla_service.attacks import LogitsFn
from tla_service.data.augmentation import to_unit
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

    def logits(images: Tensor) -> Tensor:
        result: Tensor = network(images).logits
        return result

    return logits


def as_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Images as float32 in [0, 1] on the device; uint8 counts to 255."""
    images = images.to(device)
    return to_unit(images) if images.dtype == torch.uint8 else images.float()
