"""Normalization of images inside a network."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

CIFAR10_MEAN: Final = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Final = (0.2471, 0.2435, 0.2616)  # over pixels, as in Rice et al. 2020
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


class PerImageStandardization(nn.Module):
    """Each image minus its mean, over its standard deviation: TensorFlow's ``per_image_standardization``.

    Over all channels and pixels of one image: ``(x - mean) / max(std, 1 / sqrt(num_values))``. The lower bound is in
    the units that TensorFlow sees, and the paper's networks feed it pixels in [0, 255]; so for images in [0, 1] it is
    divided by 255. It matters for almost constant images only.

    Args:
        pixel_range: The largest pixel value in the units of the lower bound; 1 applies the bound to [0, 1] pixels.
    """

    def __init__(self, pixel_range: float = 255.0) -> None:
        super().__init__()
        self.pixel_range = pixel_range

    def forward(self, images: Tensor) -> Tensor:
        """Standardizes images (N, C, H, W) in [0, 1]; same shape, mean 0 per image."""
        smallest_std = 1.0 / (self.pixel_range * math.sqrt(images.shape[1:].numel()))
        centered = images - images.mean(dim=(1, 2, 3), keepdim=True)
        variance = centered.square().mean(dim=(1, 2, 3), keepdim=True)
        # The bound goes on before the root: the root's slope at 0 is infinite, and a constant image would give NaN.
        return centered / variance.clamp_min(smallest_std**2).sqrt()


class ChannelNormalization(nn.Module):
    """Fixed ``(x - mean) / std`` per channel.

    Args:
        mean: One per channel, in [0, 1] pixels.
        std: One per channel, in [0, 1] pixels, positive.

    Raises:
        ValueError: The lengths differ, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"need as many means as positive standard deviations, got {mean} and {std}")
        # Constants of the architecture, not weights: left out of the state dict, whose names then match the
        # published checkpoints' names one to one.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalizes images (N, C, H, W) in [0, 1]; same shape."""
        return (images - self.mean) / self.std
