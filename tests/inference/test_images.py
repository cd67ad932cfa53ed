"""Every form of an image means the same pixels, and what means nothing is refused with a sentence."""

import base64
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.inference.files import encoded
from tla_service.data.decoding import Decoder
from tla_service.inference.images import BadImages, read_images
from tla_service.inference.predictor import Predictor
from tla_service.models import build_model
from tla_service.pixels import describe

SHAPE = (1, 8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
UNIT = PIXELS.astype(np.float32) / 255


PNGS = [encoded(image) for image in PIXELS]
TEXTS = [base64.b64encode(png).decode() for png in PNGS]


@pytest.mark.parametrize(
    "sent",
    [PIXELS, PNGS, np.array(PNGS, dtype=object), pd.DataFrame({"image": PNGS}), TEXTS, PIXELS.tolist()],
    ids=["uint8", "bytes", "array of bytes", "table", "base64", "whole numbers"],
)
def test_8_bit_images_of_every_form(sent: object) -> None:
    read = read_images(sent, SHAPE)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, PIXELS)


@pytest.mark.parametrize("sent", [UNIT, UNIT.astype(np.float64), UNIT.tolist(), list(UNIT)])
def test_fractions_of_every_form(sent: object) -> None:
    read = read_images(sent, SHAPE)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, UNIT)


def test_one_encoded_image_and_a_jpeg() -> None:
    np.testing.assert_array_equal(read_images(PNGS[0], SHAPE), PIXELS[:1])
    smooth = np.add.outer(np.arange(8), np.arange(8)).astype(np.uint8)[None] * 8
    assert np.abs(read_images([encoded(smooth, "JPEG")], SHAPE)[0].astype(int) - smooth).max() < 8


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "1"])
def test_colour_models_are_brought_to_the_networks(mode: str) -> None:
    colours = np.random.default_rng(1).integers(0, 2, (3, 8, 8), dtype=np.uint8) * 255
    read = read_images([encoded(colours, mode=mode)], (3, 8, 8))
    wanted = np.moveaxis(np.asarray(Image.open(io.BytesIO(encoded(colours, mode=mode))).convert("RGB")), 2, 0)
    np.testing.assert_array_equal(read[0], wanted)


def huge_png(side: int) -> bytes:
    """A few hundred bytes that would unpack to a hundred megabytes and more."""
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    return stream.getvalue()


def deep_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(stream, "PNG")
    return stream.getvalue()


BAD: dict[str, tuple[object, str]] = {
    "other shape": (UNIT[:, :, :4], r"shape \(3, 1, 4, 8\); send \(N, 1, 8, 8\)"),
    "no batch": (UNIT[0], r"shape \(1, 8, 8\)"),
    "NaN": (UNIT * np.float32(np.nan), "NaN"),
    "infinite": (UNIT + np.float32(np.inf), "infinite"),
    "beyond 1": (UNIT + 1, r"range over \[1.*send \[0, 1\]"),
    "below 0": (UNIT - 1, r"range over \[-1"),
    "8-bit values as floats": (UNIT * 255, "send 8-bit values as uint8, or divide them by 255"),
    "nobody": (UNIT[:0], "at least one"),
    "an empty list": ([], "at least one"),
    "too many": (np.zeros((10_001, *SHAPE), np.uint8), "at most 10000"),
    "int64": (PIXELS.astype(np.int64), "are int64"),
    "complex": (UNIT.astype(complex), "are complex128"),
    "truth values": (UNIT > 0.5, "are bool"),
    "whole numbers too large": ((PIXELS.astype(int) * 2).tolist(), r"send 8-bit values in \[0, 255\]"),
    "zeros and ones without a type": ([[[[0, 1] * 4] * 8]], r"write 0\.0 and 1\.0"),
    "ragged": ([[1.0, [2.0]]], "no array of numbers"),
    "words": (["cat"], "image 0 is not base64"),
    "base64 of no image": ([base64.b64encode(b"hello").decode()], "image 0 is no PNG or JPEG"),
    "truncated PNG": ([PNGS[0], PNGS[1][:70]], "image 1 is damaged"),
    "truncated JPEG": ([encoded(np.tile(PIXELS[0], (1, 8, 8)), "JPEG")[:900]], "image 0 (is damaged|has 64x64)"),
    "a GIF": ([encoded(PIXELS[0], "GIF")], "no PNG or JPEG"),
    "another size": ([encoded(np.zeros((1, 9, 7), np.uint8))], r"7x9 pixels \(width x height\); send 8x8"),
    "a bomb": ([huge_png(9_000)], "9000x9000 pixels"),
    "a larger bomb": ([huge_png(20_000)], "far too many pixels"),
    "16 bits": ([deep_png()], "more than 8 bits"),
    "mixed": ([PNGS[0], 3], "image 1 is a int"),
    "two columns": (pd.DataFrame({"a": PNGS, "b": PNGS}), "2 columns"),
    "a mapping": ({"image": PNGS}, "images are a dict"),
    "nothing": (None, "images are a NoneType"),
}


@pytest.mark.parametrize(("sent", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_meant(sent: object, message: str) -> None:
    with pytest.raises(BadImages, match=message):
        read_images(sent, SHAPE)


def test_a_truncated_jpeg_of_the_right_size() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    whole = encoded(noise, "JPEG")
    assert read_images([whole], (3, 64, 64)).shape == (1, 3, 64, 64)
    with pytest.raises(BadImages, match=r"image 0 is damaged .*truncated"):
        read_images([whole[: len(whole) // 2]], (3, 64, 64))


def photograph(mode: str, kind: str, size: tuple[int, int], **options: object) -> bytes:
    """A file with edges and gradients, on which filters, crops and orientations differ."""
    width, height = size
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    pixels[:, : width // 3] = np.linspace(0, 255, height, dtype=np.uint8)[:, None, None]
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # to be shown rotated by 90 degrees
PHOTOGRAPHS = {
    "wide JPEG": photograph("RGB", "JPEG", (301, 200)),
    "tall JPEG": photograph("RGB", "JPEG", (37, 64)),
    "sideways JPEG": photograph("RGB", "JPEG", (90, 60), exif=SIDEWAYS.tobytes()),
    "CMYK JPEG": photograph("CMYK", "JPEG", (50, 50)),
    "grey JPEG": photograph("L", "JPEG", (33, 40)),
    "RGBA PNG": photograph("RGBA", "PNG", (45, 31)),
    "palette PNG": photograph("P", "PNG", (40, 50)),
    "black and white PNG": photograph("1", "PNG", (40, 50)),
    "smaller PNG": photograph("RGB", "PNG", (9, 12)),
    "PNG of the size": photograph("RGB", "PNG", (24, 24)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_file_of_another_size_gives_the_pixels_of_training(name: str, channels: int) -> None:
    blob, shape = PHOTOGRAPHS[name], (channels, 24, 24)
    trained = Decoder(shape, resize=True)(blob, name)
    for sent in ([blob], [base64.b64encode(blob).decode()]):
        read = read_images(sent, shape, resize=True)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read[0], trained)
    # What users are told to do themselves.
    image = Image.open(io.BytesIO(blob))
    image = (image.convert("RGBA") if image.mode == "P" else image).convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(square).reshape(24, 24, channels), np.moveaxis(trained, 0, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_8_bits_are_resized_like_the_files(channels: int) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (2, channels, 30, 41), np.uint8)
    shape = (channels, 8, 8)
    files = read_images([encoded(image) for image in pixels], shape, resize=True)
    for sent in (pixels, pixels.tolist(), list(pixels)):
        np.testing.assert_array_equal(read_images(sent, shape, resize=True), files)


def test_what_is_not_resized_is_said() -> None:
    for sent, message in (
        (np.zeros((1, 1, 9, 9), np.float32), r"shape \(1, 1, 9, 9\); send \(N, 1, 8, 8\), uint8 or encoded images"),
        (np.zeros((1, 3, 9, 9), np.uint8), r"shape \(1, 3, 9, 9\); send \(N, 1, 8, 8\)"),
        (np.zeros((1, 9, 9), np.uint8), r"shape \(1, 9, 9\)"),
        (np.zeros((1, 1, 0, 9), np.uint8), r"shape \(1, 1, 0, 9\)"),
        ([huge_png(9_000)], "9000x9000 pixels; send at most 67108864"),
    ):
        with pytest.raises(BadImages, match=message):
            read_images(sent, SHAPE, resize=True)


def test_versions_of_before_resize_nothing() -> None:
    network = build_model("digits_cnn", 10, SHAPE)
    description = {"image_shape": SHAPE, "class_names": ["0"] * 10}
    assert not Predictor(network, description, None).resize
    assert Predictor(network, description | {"preprocessing": describe(SHAPE, resize=True)}, None).resize
