"""From a decoded image to the pixels that a network sees: for training and for registered models, which ship it."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

ImageShape = tuple[int, int, int]


def to_pixels(image: Image.Image, image_shape: ImageShape, *, resize: bool) -> npt.NDArray[np.uint8]:
    """An image of 8 bits per channel as an array ``image_shape`` (C, H, W), which it must fit unless ``resize`` is set.

    `describe` says what is done, step by step.
    """
    channels, height, width = image_shape
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        # Pillow wants palettes with transparency to pass through RGBA.
        image = (image.convert("RGBA") if image.mode == "P" else image).convert(mode)
    if resize:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Cropped first: with resize's own box the filter reads pixels outside the square.
        square = image.crop((left, top, left + side, top + side))
        image = square.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.moveaxis(pixels, 2, 0)


def describe(image_shape: ImageShape, *, resize: bool) -> dict[str, Any]:
    """What `to_pixels` does, for people and for `model.json`."""
    channels, height, width = image_shape
    steps = ["decode with Pillow; EXIF orientation is not applied"]
    steps.append(f"convert to {'grey (L)' if channels == 1 else 'RGB'}, dropping transparency")
    if resize:
        steps.append("crop the largest centered square, offsets rounded down")
        steps.append(f"resize to {width}x{height} with Pillow's BILINEAR filter, which antialiases")
    return {"resize": resize, "steps": [*steps, "divide by 255"]}
