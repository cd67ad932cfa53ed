"""Random crops, flips, colour and stronger augmentation for whole batches, on the device."""

import torch
from torch.nn import functional

from tla_service.config import DataConfig

_LUMA = (0.299, 0.587, 0.114)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Pixels 0..255 (N, C, H, W), uint8, to [0, 1], float32."""
    return images.to(torch.float32).div_(255)


def augment(images: torch.Tensor, config: DataConfig, draws: torch.Generator, *, strongly: bool = True) -> torch.Tensor:
    """Crop, flip and change the saturation of every image at random, as configured.

    Images (N, C, H, W), uint8, become float32 in [0, 1], all at once, without waiting for the device; the generator is
    on the device, too. ``augment`` comes first, unless ``strongly`` is false. ``crop_padding`` is zero padding, then a
    random crop of the original size; ``flip`` is horizontal, of half of the images; ``saturation`` s (RGB only)
    multiplies the distance from grey by a factor uniform in [1/s, s].
    """
    if strongly and config.augment != "none":
        from tla_service.data.strong import strongly_augmented

        images = strongly_augmented(images, config.augment, draws.initial_seed() + 1)  # not the numbers of the crops
    if config.crop_padding or config.flip:
        images = _crop_and_flip(images, config.crop_padding, draws, flip=config.flip)
    unit = to_unit(images)
    if config.saturation > 1 and images.shape[1] == 3:
        unit = _saturate(unit, config.saturation, draws)
    return unit


def _crop_and_flip(images: torch.Tensor, padding: int, draws: torch.Generator, *, flip: bool) -> torch.Tensor:
    count, channels, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(count, height)
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        flipped = torch.randint(0, 2, (count, 1), generator=draws, device=device).bool()
        columns = torch.where(flipped, width - 1 - columns, columns)
    if padding:
        images = functional.pad(images, (padding, padding, padding, padding))
        rows = rows + torch.randint(0, 2 * padding + 1, (count, 1), generator=draws, device=device)
        columns = columns + torch.randint(0, 2 * padding + 1, (count, 1), generator=draws, device=device)
    places = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).reshape(count, 1, -1)
    picked = images.flatten(2).gather(2, places.expand(count, channels, -1))
    return picked.reshape(count, channels, height, width)


def _saturate(unit: torch.Tensor, most: float, draws: torch.Generator) -> torch.Tensor:
    shape = (len(unit), 1, 1, 1)
    factor = torch.rand(shape, generator=draws, device=unit.device) * (most - 1 / most) + 1 / most
    grey = sum(weight * unit[:, channel : channel + 1] for channel, weight in enumerate(_LUMA))
    return (grey + factor * (unit - grey)).clamp_(0, 1)
