"""The 15 common corruptions of CIFAR-10-C, at five severities, in numpy.

Source: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
and the script that made CIFAR-10-C, whose parameters, order of random draws and peculiarities are kept: glass blur
copies pixels instead of swapping them, and results are truncated to 8 bits. Packaged implementations have the
parameters of ImageNet-C, which are for images of 224 pixels, and most refuse images of fewer than 32.

Lengths in pixels are those for 32 x 32 at every image size; zoom, elastic and pixelate are relative to the image, as
they are there. A greyscale image is corrupted in its one channel.
"""

import functools
import math
from collections.abc import Callable, Sequence
from importlib import resources
from io import BytesIO
from zlib import crc32

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from PIL import Image

from tla_service.evaluation.shards import IntArray

Pixels = npt.NDArray[np.float64]  # (N, C, H, W), in [0, 1]
Bytes = npt.NDArray[np.uint8]
Corruption = Callable[[Pixels, int, Sequence[Generator]], Pixels]

SEVERITIES = (1, 2, 3, 4, 5)
_LUMA = np.array([0.299, 0.587, 0.114])
_FROST = (1, 2, 2, 4, 5)  # the textures that the script draws from: never the sixth


def corrupt(images: Bytes, name: str, severity: int, rows: IntArray, seed: int) -> Bytes:
    """Corrupt images (N, C, H, W), uint8, with C = 1 or 3, by a name in `CORRUPTIONS` and a severity from 1 to 5.

    `rows` (N,) are the images' numbers in their set: what is random depends on seed, name, severity and number alone,
    not on the other images of the batch.
    """
    random = [np.random.default_rng([seed, crc32(name.encode()), severity, int(row)]) for row in rows]
    corrupted = CORRUPTIONS[name](images / 255.0, severity, random)
    return (corrupted.clip(0, 1) * 255).astype(np.uint8)


def _gaussian_noise(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return x + np.stack([each.normal(scale=scale, size=x.shape[1:]) for each in random])


def _shot_noise(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return np.stack([each.poisson(image * photons) for each, image in zip(random, x, strict=True)]) / photons


def _impulse_noise(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    flipped, salt = np.stack([each.random((2, *x.shape[1:])) for each in random], axis=1)
    return np.where(flipped <= amount, (salt <= 0.5).astype(float), x)


def _defocus_blur(x: Pixels, severity: int, _: Sequence[Generator]) -> Pixels:
    from scipy.ndimage import correlate

    radius, softness = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    line = np.arange(-3, 4)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(float)
    bell = np.exp(-(np.arange(-1, 2) ** 2) / (2 * softness**2))
    kernel = correlate(disk / disk.sum(), np.outer(bell, bell) / bell.sum() ** 2, mode="constant")
    return correlate(x, kernel[None, None], mode="mirror")


def _glass_blur(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    sigma, times = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    count, _, height, width = x.shape
    x = np.floor(_blur(x, sigma, "nearest") * 255)
    image = np.arange(count)[:, None, None]
    for _ in range(times):
        # The last pixel comes first, and each takes the value of one whose turn is later: the order does not matter.
        moves = np.stack([each.integers(-1, 1, size=(height - 2, width - 2, 2)) for each in random])
        moves = moves[:, ::-1, ::-1]
        rows, columns = np.arange(2, height)[:, None] + moves[..., 1], np.arange(2, width) + moves[..., 0]
        x[:, :, 2:, 2:] = x[image, :, rows, columns].transpose(0, 3, 1, 2)
    return _blur(x / 255, sigma, "nearest")


def _motion_blur(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    angles = np.array([each.uniform(-45, 45) for each in random])
    return _smear(x, radius, sigma, angles)


def _zoom_blur(x: Pixels, severity: int, _: Sequence[Generator]) -> Pixels:
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)  # with its rounding at the end
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    mean, scale, zoom, threshold, radius, sigma, share = (
        (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    flakes = _zoomed(np.stack([each.normal(mean, scale, size=(1, *x.shape[2:])) for each in random]), zoom)
    flakes = np.floor(np.where(flakes < threshold, 0, flakes).clip(0, 1) * 255) / 255
    angles = np.array([each.uniform(-135, -45) for each in random])
    flakes = _smear(flakes, radius, sigma, angles)
    whiter = share * x + (1 - share) * np.maximum(x, 1.5 * _grey(x) + 0.5)
    return whiter + flakes + np.rot90(flakes, 2, axes=(2, 3))


def _frost(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    kept, added = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    height, width = x.shape[2:]
    crops = []
    for each in random:
        texture = _texture(_FROST[each.integers(5)], height, width)
        top, left = each.integers(texture.shape[1] - height), each.integers(texture.shape[2] - width)
        crops.append(texture[:, top : top + height, left : left + width])
    frost = np.stack(crops)
    return kept * x + added * (frost if x.shape[1] == 3 else _grey(frost))


def _fog(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    side = 2 ** math.ceil(math.log2(max(x.shape[2:])))
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    clouds = np.stack([_plasma(side, decay, each) for each in random])[:, None, : x.shape[2], : x.shape[3]]
    return (x + amount * clouds) * brightest / (brightest + amount)


def _brightness(x: Pixels, severity: int, _: Sequence[Generator]) -> Pixels:
    added = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    # Adding to the value of HSV scales the channels; black has no hue to keep.
    value = x.max(axis=1, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def _contrast(x: Pixels, severity: int, _: Sequence[Generator]) -> Pixels:
    mean = x.mean(axis=(2, 3), keepdims=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + mean


def _elastic_transform(x: Pixels, severity: int, random: Sequence[Generator]) -> Pixels:
    reach, sigma, moved = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    height, width = x.shape[2:]
    # An affine map: three corners of a square in the middle, (x, y), are moved at random.
    middle, half = np.array([height // 2, width // 2]), min(height, width) // 3
    corners = middle + half * np.array([[1, 1], [1, -1], [-1, -1]])
    moves = np.stack([each.uniform(-moved * height, moved * height, size=(3, 2)) for each in random])
    waves = np.stack([each.uniform(-1, 1, size=(2, height, width)) for each in random])
    inverse = np.linalg.solve(_with_ones(corners + moves), np.broadcast_to(corners, moves.shape))
    rows, columns = np.mgrid[:height, :width].astype(float)
    places = _with_ones(np.stack([columns, rows], axis=-1).reshape(1, -1, 2)) @ inverse
    places = places.reshape(-1, height, width, 2)
    x = _sampled(x, places[..., 1], places[..., 0], "mirror")
    shift_x, shift_y = np.moveaxis(_blur(waves, sigma * height, "reflect", truncate=3) * reach * height, 1, 0)
    return _sampled(x, rows + shift_y, columns + shift_x, "reflect")


def _pixelate(x: Pixels, severity: int, _: Sequence[Generator]) -> Pixels:
    ratio = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = x.shape[2:]
    small = int(width * ratio), int(height * ratio)
    box = Image.Resampling.BOX
    return _by_pillow(x, lambda picture: picture.resize(small, box).resize((width, height), box))


def _jpeg_compression(x: Pixels, severity: int, _: Sequence[Generator]) -> Pixels:
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def compressed(picture: Image.Image) -> Image.Image:
        stream = BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _by_pillow(x, compressed)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


def _grey(x: Pixels) -> Pixels:
    return x if x.shape[1] == 1 else np.tensordot(_LUMA, x, axes=(0, 1))[:, None]


def _blur(x: Pixels, sigma: float, mode: str, truncate: float = 4.0) -> Pixels:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, 0, sigma, sigma), mode=mode, truncate=truncate)


def _smear(x: Pixels, radius: int, sigma: float, angles: npt.NDArray[np.float64]) -> Pixels:
    """Blur along a line at an angle (N,) in degrees, to one side, as ImageMagick's motion blur does; edges repeat."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    image = np.arange(len(x))[:, None, None]
    blurred = np.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down, right = (np.ceil(step * turn(np.radians(angles)) - 0.5).astype(int) for turn in (np.sin, np.cos))
        rows = (np.arange(x.shape[2]) + down[:, None]).clip(0, x.shape[2] - 1)[:, :, None]
        columns = (np.arange(x.shape[3]) + right[:, None]).clip(0, x.shape[3] - 1)[:, None, :]
        blurred += weight * x[image, :, rows, columns].transpose(0, 3, 1, 2)
    return np.rint(blurred * 255) / 255  # ImageMagick returns 8 bits


def _zoomed(x: Pixels, factor: float) -> Pixels:
    """The middle of images, enlarged bilinearly to at least their size and cropped to it."""
    down, across = (_enlarging(side, factor) for side in x.shape[2:])
    return down @ x @ across.T


@functools.lru_cache(maxsize=256)
def _enlarging(side: int, factor: float) -> npt.NDArray[np.float64]:
    from scipy.ndimage import zoom

    cropped = math.ceil(side / factor)
    first = (side - cropped) // 2
    large = zoom(np.eye(side)[first : first + cropped], (factor, 1), order=1)
    trim = (len(large) - side) // 2
    return large[trim : trim + side]


def _plasma(side: int, decay: float, random: Generator) -> npt.NDArray[np.float64]:
    """A random height map in [0, 1] by the diamond-square algorithm; the side is a power of two."""
    heights = np.zeros((side, side))
    step, wobble = side, 100.0

    def mean(total: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return total / 4 + wobble * random.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = middles = mean(pairs + np.roll(pairs, -1, axis=1))
        beside = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = mean(beside)
        above = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = mean(above)
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


@functools.lru_cache(maxsize=8)
def _texture(number: int, height: int, width: int) -> Pixels:
    """A texture (3, h, w) in [0, 1] that is larger than an image; a small one is enlarged."""
    path = resources.files("tla_service.evaluation") / "frost" / f"frost{number}.webp"
    with path.open("rb") as file, Image.open(file) as opened:
        picture = opened.convert("RGB")
        larger = max((height + 1) / picture.height, (width + 1) / picture.width)
        if larger > 1:
            picture = picture.resize((math.ceil(picture.width * larger), math.ceil(picture.height * larger)))
        return np.asarray(picture).transpose(2, 0, 1) / 255


def _with_ones(points: Pixels) -> Pixels:
    return np.concatenate([points, np.ones((*points.shape[:-1], 1))], axis=-1)


def _sampled(x: Pixels, rows: Pixels, columns: Pixels, mode: str) -> Pixels:
    """Values of images (N, C, H, W) at places (N, H, W), interpolated bilinearly."""
    from scipy.ndimage import map_coordinates

    image = np.broadcast_to(np.arange(len(x))[:, None, None], rows.shape)
    channels = [map_coordinates(x[:, c], [image, rows, columns], order=1, mode=mode) for c in range(x.shape[1])]
    return np.stack(channels, axis=1)


def _by_pillow(x: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    levels = np.rint(x * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    pictures = (Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each) for each in levels)
    return (
        np.stack([np.asarray(change(picture)) for picture in pictures]).reshape(levels.shape).transpose(0, 3, 1, 2)
        / 255
    )
