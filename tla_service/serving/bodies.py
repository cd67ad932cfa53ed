"""Parses HTTP request bodies into images."""

import io
import json

import numpy as np

from tla_service.inference.images import BadImages, read_images

JSON, NPY = "application/json", "application/x-npy"
ENCODED = ("image/png", "image/jpeg")


def parse_body(
    body: bytes, content_type: str, image_shape: tuple[int, int, int], max_images: int, *, resize: bool = False
) -> tuple[np.ndarray, bool]:
    """Images (N, C, H, W), float32 in [0, 1], and whether embeddings are requested; raises `BadImages`."""
    embedding = False
    if content_type == JSON:
        try:
            sent = json.loads(body)
        except (ValueError, RecursionError):
            raise BadImages("the body is not JSON") from None
        if not isinstance(sent, dict) or "images" not in sent or set(sent) - {"images", "embedding"}:
            raise BadImages('the body is not of the form {"images": [...], "embedding": false}')
        embedding = sent.get("embedding", False)
        if not isinstance(embedding, bool):
            raise BadImages("embedding is neither true nor false")
        sent = sent["images"]
    elif content_type == NPY:
        try:
            sent = np.load(io.BytesIO(body), allow_pickle=False)
        except Exception:  # noqa: BLE001 - numpy lets errors of many kinds through
            raise BadImages("the body is not an array in .npy format") from None
    else:
        sent = [body]
    images = read_images(sent, image_shape, max_images=max_images, resize=resize)
    return images / np.float32(255) if images.dtype == np.uint8 else images, embedding
