"""Image files for the tests."""

import io

import numpy as np
from PIL import Image


def encoded(image: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    """One image (C, H, W) as a file."""
    stream = io.BytesIO()
    opened = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2))
    opened.convert(mode or opened.mode).save(stream, kind, quality=95)
    return stream.getvalue()
