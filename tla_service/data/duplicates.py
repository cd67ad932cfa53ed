"""Near-duplicates between sets of images: copies that were recompressed, brightened, mirrored or slightly shifted.

An image's nearest reference is found among thumbnails of 6x6 pixels, and is then compared with it at up to 32x32
pixels, over shifts of up to 1/16 of the side. Distances are those of unit vectors, in [0, 2], after the mean over all
values is subtracted, so neither brightness nor contrast matters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, layer_norm

from tla_service.data.sources import ImageSource, SourceRows

# Measured on CIFAR-10: docs/data.md, Extra images.
NEAR = 0.25
_COARSE_SIDE, _FINE_SIDE, _SHIFTS = 6, 32, 16
_CHUNK = 1024
_READ = 2**24  # values at a time, as float32


def near_duplicates(source: ImageSource, references: Sequence[SourceRows]) -> dict[str, Tensor]:
    """Compare all images with those at the rows of each reference, all of one shape.

    Returns ``rows`` of images whose nearest reference is nearer than `NEAR`; ``references``, its position among all of
    them; and ``distances``; each (n,).
    """
    known = torch.cat([_reduced(other, rows) for other, rows in references])
    table = torch.cat([_coarse(known), _coarse(known.flip(3))]).T
    found = []
    for rows in torch.arange(len(source)).split(_CHUNK):
        images = _reduced(source, rows)
        places = (_coarse(images) @ table).max(1).indices
        is_mirrored, places = places >= len(known), places % len(known)
        nearest = torch.where(is_mirrored[:, None, None, None], known[places].flip(3), known[places])
        distances = _distances(images, nearest)
        near = distances < NEAR
        found.append((rows[near], places[near], distances[near]))
    return dict(zip(("rows", "references", "distances"), map(torch.cat, zip(*found, strict=True)), strict=True))


def _reduced(source: ImageSource, rows: Tensor) -> Tensor:
    channels, height, width = source.image_shape
    sides = (min(_FINE_SIDE, height), min(_FINE_SIDE, width))
    some = rows.split(max(1, _READ // (channels * height * width)))
    return torch.cat([adaptive_avg_pool2d(source.fetch(each).float(), sides).round().byte() for each in some])


def _coarse(images: Tensor) -> Tensor:
    return _unit(adaptive_avg_pool2d(images.float(), _COARSE_SIDE))


def _distances(images: Tensor, references: Tensor) -> Tensor:
    """The least distance (n,) of the images' centers (n, C, h, w) from windows of their size in the references."""
    reach = min(images.shape[2:]) // _SHIFTS
    height, width = (side - 2 * reach for side in images.shape[2:])
    center = images[:, :, reach : reach + height, reach : reach + width].float()
    references = references - references.float().mean((1, 2, 3), keepdim=True)  # for precision
    products = conv2d(references.flatten(0, 1)[None], _unit(center).view(center.shape), groups=len(images))[0]
    mean, square = (avg_pool2d(values.mean(1), (height, width), 1) for values in (references, references**2))
    lengths = (center[0].numel() * (square - mean**2)).clamp(min=1e-6).sqrt()
    return (2 - 2 * (products / lengths).amax((1, 2))).clamp(min=0).sqrt()


def _unit(images: Tensor) -> Tensor:
    """Vectors (n, D) with mean 0 and length 1; of plain images, 0."""
    flat = images.flatten(1)
    return layer_norm(flat, flat.shape[1:]) / flat.shape[1] ** 0.5
