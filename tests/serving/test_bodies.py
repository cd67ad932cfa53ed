"""From HTTP bodies to images, and what is said of those that hold none."""

import io
import json

import numpy as np
import pytest

from tests.inference.files import encoded
from tla_service.inference.images import BadImages
from tla_service.serving.bodies import JSON, NPY, parse_body

SHAPE = (1, 8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
UNIT = PIXELS.astype(np.float32) / np.float32(255)


def npy(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (json.dumps({"images": PIXELS.tolist()}).encode(), JSON),
        (json.dumps({"images": UNIT.tolist()}).encode(), JSON),
        (npy(PIXELS), NPY),
        (npy(UNIT), NPY),
    ],
)
def test_every_body_means_the_same(body: bytes, kind: str) -> None:
    images, embedding = parse_body(body, kind, SHAPE, 10)
    assert (images.dtype, embedding) == (np.float32, False)
    np.testing.assert_allclose(images, UNIT, atol=1e-7)


def test_one_picture_and_the_wish_for_embeddings() -> None:
    images, _ = parse_body(encoded(PIXELS[0]), "image/png", SHAPE, 10)
    np.testing.assert_array_equal(images, UNIT[:1])
    assert parse_body(json.dumps({"images": PIXELS.tolist(), "embedding": True}).encode(), JSON, SHAPE, 10)[1]


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"{", JSON, "is not JSON"),
        (b"\xff\xfe{", JSON, "is not JSON"),
        (b"[" * 100_000, JSON, "is not JSON"),
        (b"[1]", JSON, "not of the form"),
        (b'{"images": [], "x": 1}', JSON, "not of the form"),
        (b'{"images": [], "embedding": 1}', JSON, "neither true nor false"),
        (b'{"images": []}', JSON, "there are no images"),
        (b"", NPY, "not an array"),
        (npy(PIXELS)[:100], NPY, "not an array"),
        (npy(np.array([{"a": 1}]), allow_pickle=True), NPY, "not an array"),
        (npy(np.array(0.5)), NPY, "images are a float"),
        (npy(PIXELS).replace(b"(3,", b"(((", 1), NPY, "not an array"),
        (b"PK\x03\x04" + bytes(40), NPY, "not an array"),
        (npy(np.repeat(PIXELS, 4, axis=0)), NPY, "at most 10"),
        (b"", "image/png", "no PNG or JPEG"),
    ],
)
def test_bodies_without_images(body: bytes, kind: str, words: str) -> None:
    with pytest.raises(BadImages, match=words):
        parse_body(body, kind, SHAPE, 10)


def test_pictures_of_any_size_for_versions_that_resize() -> None:
    picture = encoded(np.tile(PIXELS[0], (1, 2, 3)))
    with pytest.raises(BadImages, match="24x16 pixels"):
        parse_body(picture, "image/png", SHAPE, 10)
    images, _ = parse_body(picture, "image/png", SHAPE, 10, resize=True)
    assert images.shape == (1, *SHAPE)
