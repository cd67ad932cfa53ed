"""Encoded images (PNG, JPEG, WebP, ...) to uint8 tensors."""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from tla_service.errors import ConfigError, UnavailableError
from tla_service.pixels import to_pixels

_PROBED = 64  # enough to tell a grey set from a colour set with a few grey images
_CHUNK = 256
# Formats with an unmistakable header; some of Pillow's others match almost any bytes.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF", "QOI")
# Two letters of text look like these; the whole header decides.
_TEXT_LIKE = frozenset({"BMP", "PPM"})
_MOST_PIXELS = 2**26  # of an image; decoding takes 4 bytes of each, and runs in several threads
_RESIZED = 2**24  # values at a time, since they are float32 until they are rounded
_PREFIX = 16  # bytes that Pillow's plugins look at
_GREY_MODES = frozenset({"1", "L", "LA"})


class Blobs(Protocol):
    """Encoded images by number; `name` is for messages, `stamp` changes with the files as far as that is cheap."""

    def __len__(self) -> int: ...
    def read(self, row: int) -> bytes: ...  # noqa: D102
    def name(self, row: int) -> str: ...  # noqa: D102
    def stamp(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Decoder:
    """Decodes the images of a set to ``image_shape`` (C, H, W), uint8; C is 1 or 3.

    With ``resize``, as `to_pixels` does it; otherwise an image of another size is refused.
    """

    image_shape: tuple[int, int, int]
    resize: bool

    def __call__(self, blob: bytes, name: str) -> np.ndarray:
        """Decode one image, called ``name`` in messages; errors as `open_image` and `pixels`."""
        return self.pixels(open_image(blob, name), name)

    def pixels(self, image: Image.Image, name: str) -> np.ndarray:
        """The pixels of an opened image; ConfigError if it has another size than it must have."""
        _, height, width = self.image_shape
        if not self.resize and image.size != (width, height):
            reason = f"{name} has {image.width}x{image.height} pixels, others {width}x{height}"
            raise ConfigError("data.image_size", None, reason, "give the side to resize all to")
        return to_pixels(image, self.image_shape, resize=self.resize)


def is_image(handle: IO[bytes]) -> bool:
    """Whether a file begins like an image of a common format, whatever its name."""
    Image.init()
    start = handle.read(_PREFIX)
    accepts = {name: Image.OPEN[name][1] for name in _FORMATS}
    # A plugin that is not installed answers with a text.
    likely = [name for name, accept in accepts.items() if accept is not None and accept(start) is True]
    if not set(likely) & _TEXT_LIKE:
        return bool(likely)
    try:
        Image.open(handle, formats=likely).close()
    except Image.DecompressionBombError:
        return True
    except (OSError, ValueError):  # UnidentifiedImageError is an OSError
        return False
    return True


def open_image(blob: bytes, name: str) -> Image.Image:
    """Read an encoded image of 8 bits per channel; else UnavailableError."""
    try:
        image = Image.open(io.BytesIO(blob), formats=_FORMATS)  # EPS, for one, would be run by Ghostscript
        if image.width * image.height <= _MOST_PIXELS:  # before any is decoded, since a small file can hold many
            image.load()
    # Pillow's decoders raise errors of many kinds.
    except Exception as error:
        reason = f"not a readable image ({type(error).__name__}: {error})"
        raise UnavailableError("data.root", name, reason, "replace or remove the file") from error
    if image.width * image.height > _MOST_PIXELS:
        reason = f"has {image.width}x{image.height} pixels, more than {_MOST_PIXELS}"
        raise UnavailableError("data.root", name, reason, "make it smaller")
    if image.mode[0] in "IF":
        raise UnavailableError("data.root", name, "has more than 8 bits per channel", "convert it to 8 bits")
    return image


def probe(blobs: Blobs, image_size: int | None, *, colour: bool | None = None) -> Decoder:
    """Choose a decoder from up to 64 training images, evenly spread.

    Images keep the size of the first one if no side ``image_size`` in pixels is given, and become RGB unless ``colour``
    is false, or it is ``None`` and all are grey. Damaged ones are passed over, to be refused when they are decoded,
    unless all are.
    """
    images, errors = [], []
    for row in evenly_spread(len(blobs), _PROBED if colour is None else 1):
        try:
            images.append(open_image(blobs.read(row), blobs.name(row)))
        except UnavailableError as error:
            errors.append(error)
    if not images:
        raise errors[0]
    if colour is None:
        colour = any(image.mode not in _GREY_MODES for image in images)
    width, height = images[0].size if image_size is None else (image_size, image_size)
    return Decoder((3 if colour else 1, height, width), resize=image_size is not None)


def decode(blobs: Blobs, rows: Sequence[int], decoder: Decoder, threads: int | None = None) -> torch.Tensor:
    """Decode images to (len(rows), C, H, W), uint8; by default in up to 16 threads, one per core."""
    images = np.empty((len(rows), *decoder.image_shape), np.uint8)

    def fill(start: int) -> None:
        for place in range(start, min(start + size, len(rows))):
            row = rows[place]
            images[place] = decoder(blobs.read(row), blobs.name(row))

    if threads is None:
        threads = min(16, usable_cores())
    size = max(1, min(_CHUNK, -(-len(rows) // threads)))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(0, len(rows), size)))  # the first damaged file cancels the rest
    return torch.from_numpy(images)


def usable_cores() -> int:
    """CPU cores this process may run on, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """Resize images (N, C, H, W) to (N, C, side, side), uint8; bilinear, antialiased."""
    if images.shape[2:] == (side, side):
        return images
    found = images.new_empty((*images.shape[:2], side, side))
    size = max(1, _RESIZED // found[0].numel()) if len(found) else 1
    for chunk, target in zip(images.split(size), found.split(size), strict=True):
        exact = functional.interpolate(chunk.float(), size=(side, side), mode="bilinear", antialias=True)
        target.copy_(exact.round_().clamp_(0, 255))
    return found


def evenly_spread(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` numbers in [0, count), evenly spread, ascending, the first among them."""
    return sorted({place * count // wanted for place in range(wanted)}) if count else []
