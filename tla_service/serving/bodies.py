"""From an HTTP body to images."""

import io
import json
from typing import Any

import numpy as np

from tla_service.inference.images import BadImages, read_images

JSON, NPY = "application/json", "application/x-npy"
ENCODED = ("image/png", "image/jpeg")


def parse_body(
    body: bytes, content_type: str, image_shape: tuple[int, int, int], max_images: int
) -> tuple[np.ndarray, bool]:
    """Images of a request, and whether their embeddings are wanted.

    Args:
        body: As it was sent.
        content_type: JSON (``{"images": ..., "embedding": false}``), an array in numpy's format, or one image.
        image_shape: (C, H, W) of the network.
        max_images: More are refused.

    Returns:
        (N, C, H, W), float32 in [0, 1], and the wish.

    Raises:
        BadImages: The body cannot be read, or its images cannot be classified.
    """
    embedding = False
    if content_type == JSON:
        try:
            sent = json.loads(body)
        except (ValueError, RecursionError):
            raise BadImages("the body is not JSON") from None
        if not isinstance(sent, dict) or "images" not in sent or set(sent) - {"images", "embedding"}:
            raise BadImages('the body is not of the form {"images": [...], "embedding": false}')
        if not isinstance(sent.get("embedding", False), bool):
            raise BadImages("embedding is neither true nor false")
        embedding = bool(sent.get("embedding", False))
        sent = sent["images"]
    else:
        sent = _array(body) if content_type == NPY else [body]
    images = read_images(sent, image_shape, max_images=max_images)
    unit = images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images
    return unit.astype(np.float32, copy=False), embedding


def _array(body: bytes) -> Any:
    try:
        return np.load(io.BytesIO(body), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise BadImages("the body is no array in numpy's .npy format") from None
