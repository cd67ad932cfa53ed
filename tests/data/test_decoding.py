"""Images of every usual kind, and rubbish."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tla_service.data.decoding import Decoder, decode, evenly_spread, is_image, open_image, probe, resized
from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.pixels import to_pixels

Encode = Callable[..., bytes]
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 3), np.uint8)


class Blobs(list[bytes]):
    """Encoded images in a list."""

    def read(self, row: int) -> bytes:
        return self[row]

    def name(self, row: int) -> str:
        return f"image {row}"

    def stamp(self) -> str:
        return ""


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PPM", {})])
def test_lossless_kinds_come_back_exactly(encoded: Encode, kind: str, options: dict[str, bool]) -> None:
    decoder = Decoder((3, 6, 5), resize=False)
    assert np.array_equal(decoder(encoded(COLOUR, kind, **options), "x"), COLOUR.transpose(2, 0, 1))


def test_grey_becomes_three_equal_channels_and_colour_one(encoded: Encode) -> None:
    assert np.array_equal(Decoder((3, 6, 5), resize=False)(encoded(GREY), "x"), np.stack([GREY] * 3))
    assert np.array_equal(Decoder((1, 6, 5), resize=False)(encoded(GREY), "x"), GREY[None])
    assert Decoder((1, 6, 5), resize=False)(encoded(COLOUR), "x").shape == (1, 6, 5)


@pytest.mark.filterwarnings("error")
def test_palettes_with_transparency_become_rgb(encoded: Encode) -> None:
    palette = Image.fromarray(COLOUR).convert("P")
    handle = io.BytesIO()
    palette.save(handle, "PNG", transparency=bytes(range(256)))
    assert to_pixels(open_image(handle.getvalue(), "x"), (3, *COLOUR.shape[:2]), resize=False).shape[0] == 3


def test_resizing_takes_the_centred_square(encoded: Encode) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    found = Decoder((3, 5, 5), resize=True)(encoded(wide), "x")
    assert found.shape == (3, 5, 5)
    assert (found == 200).all()


def test_another_size_is_refused_by_name(encoded: Encode) -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size: cat\.png has 5x6 pixels, others 7x7; give the side"):
        Decoder((3, 7, 7), resize=False)(encoded(COLOUR), "cat.png")


@settings(deadline=None, max_examples=60)
@given(rubbish=st.binary(max_size=200), cut=st.integers(0, 80))
def test_rubbish_is_reported_by_name(rubbish: bytes, cut: int) -> None:
    handle = io.BytesIO()
    Image.fromarray(COLOUR).save(handle, "PNG")
    for blob in (rubbish, handle.getvalue()[:cut], handle.getvalue()[:40] + rubbish):
        with pytest.raises(UnavailableError, match=r"data\.root=bad\.png: not a readable image"):
            Decoder((3, 6, 5), resize=False)(blob, "bad.png")


def test_what_a_program_would_run_is_not_opened() -> None:
    with pytest.raises(UnavailableError, match=r"not a readable image \(UnidentifiedImageError"):
        open_image(_saved(Image.fromarray(COLOUR), "EPS"), "x")


def test_more_than_eight_bits_are_refused(encoded: Encode) -> None:
    with pytest.raises(UnavailableError, match="more than 8 bits"):
        open_image(encoded(GREY.astype(np.uint16) * 200), "deep.png")


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    handle = io.BytesIO()
    image.save(handle, kind, **options)
    return handle.getvalue()


MODES = {
    "RGBA": (Image.fromarray(np.dstack([COLOUR, np.full((6, 5), 9, np.uint8)])), "PNG", COLOUR),
    "LA": (Image.fromarray(np.dstack([GREY, np.full((6, 5), 9, np.uint8)])), "PNG", np.dstack([GREY] * 3)),
    "1": (Image.fromarray(GREY > 127), "PNG", np.dstack([(GREY > 127) * np.uint8(255)] * 3)),
    "P": (Image.fromarray(np.repeat(COLOUR[:1], 6, 0)).quantize(8), "PNG", np.repeat(COLOUR[:1], 6, 0)),
    "CMYK": (Image.frombytes("CMYK", (5, 6), np.dstack([255 - COLOUR, GREY * 0]).tobytes()), "TIFF", COLOUR),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_without_its_transparency(mode: str) -> None:
    image, kind, expected = MODES[mode]
    assert image.mode == mode
    found = Decoder((3, 6, 5), resize=False)(_saved(image, kind), "x")
    assert np.array_equal(found, expected.transpose(2, 0, 1))


def test_pixels_are_taken_as_they_are_stored_whatever_the_camera_says() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # rotated by 90 degrees, as phones note it
    found = Decoder((3, 6, 5), resize=False)(_saved(Image.fromarray(COLOUR), "PNG", exif=turned), "x")
    assert np.array_equal(found, COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize(("kind", "share"), [("PNG", 0.5), ("JPEG", 0.7), ("WEBP", 0.5), ("BMP", 0.8), ("TIFF", 0.5)])
def test_cut_images_are_named(kind: str, share: float) -> None:
    large = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    blob = _saved(Image.fromarray(large), kind)
    with pytest.raises(UnavailableError, match=r"data\.root=cut\.x: not a readable image .*; replace or remove"):
        open_image(blob[: int(share * len(blob))], "cut.x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF", "QOI"])
def test_images_are_told_from_other_files_by_their_first_bytes(kind: str) -> None:
    blob = _saved(Image.fromarray(COLOUR), kind)
    assert is_image(io.BytesIO(blob))
    assert not is_image(io.BytesIO(blob[1:]))


@given(st.binary(max_size=40))
def test_rubbish_is_no_image(rubbish: bytes) -> None:
    is_image(io.BytesIO(rubbish))  # never raises
    assert not is_image(io.BytesIO(b"x" + rubbish))


def test_a_set_is_grey_only_if_all_are(encoded: Encode) -> None:
    grey, colour = encoded(GREY), encoded(COLOUR)
    assert probe(Blobs([grey] * 5), None) == Decoder((1, 6, 5), resize=False)
    assert probe(Blobs([grey, grey, colour]), None) == Decoder((3, 6, 5), resize=False)
    assert probe(Blobs([grey] * 3), 8, colour=True) == Decoder((3, 8, 8), resize=True)


@pytest.mark.parametrize("threads", [1, 2, None])
def test_decoding_keeps_the_order(encoded: Encode, threads: int | None) -> None:
    pictures = RNG.integers(0, 256, (600, 4, 4), np.uint8)
    blobs = Blobs(encoded(picture) for picture in pictures)
    rows = RNG.permutation(600).tolist()
    found = decode(blobs, rows, Decoder((1, 4, 4), resize=False), threads)
    assert np.array_equal(found[:, 0].numpy(), pictures[rows])
    assert decode(blobs, [], Decoder((1, 4, 4), resize=False), threads).shape == (0, 1, 4, 4)


def test_a_damaged_image_among_many_is_named(encoded: Encode) -> None:
    blobs = Blobs([encoded(GREY)] * 500)
    blobs[333] = b"rubbish"
    with pytest.raises(UserError, match="image 333"):
        decode(blobs, range(500), Decoder((1, 6, 5), resize=False), 2)


def test_resized_arrays() -> None:
    images = torch.full((3, 1, 8, 8), 77, dtype=torch.uint8)
    assert resized(images, 8) is images
    larger = resized(images, 32)
    assert larger.shape == (3, 1, 32, 32)
    assert larger.dtype == torch.uint8
    assert (larger == 77).all()


def test_few_images_are_resized_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8)
    expected, sizes, interpolate = resized(images, 9), [], torch.nn.functional.interpolate
    monkeypatch.setattr("tla_service.data.decoding._RESIZED", 3 * 3 * 9 * 9)
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, **how: sizes.append(len(x)) or interpolate(x, **how)
    )
    assert torch.equal(resized(images, 9), expected)
    assert sizes == [3, 3, 1]


@given(count=st.integers(0, 1000), wanted=st.integers(1, 100))
def test_evenly_spread_numbers_are_in_range(count: int, wanted: int) -> None:
    numbers = evenly_spread(count, wanted)
    assert numbers == sorted(set(numbers))
    assert len(numbers) == min(count, wanted)
    assert all(0 <= number < count for number in numbers)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    encoded: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tla_service.data.decoding._MOST_PIXELS", 29)
    with pytest.raises(UnavailableError, match=r"data\.root=x: has 5x6 pixels, more than 29; make it smaller"):
        open_image(encoded(COLOUR), "x")
