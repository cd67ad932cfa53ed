"""Corruptions: those of the script that made CIFAR-10-C, at every size, for each image alone."""

import colorsys
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

from tla_service.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt

Bytes = npt.NDArray[np.uint8]
# What the steps of make_cifar_c.py (Hendrycks and Dietterich 2019), written again on scikit-image 0.26 and OpenCV 5,
# return for `photographs`, every fifth row and fourth column of it; random draws are taken from the images' own
# generators, channels first. ImageMagick's motion blur is the one of the package imagecorruptions 1.1.2.
GOLDEN = Path(__file__).parent / "corruptions.npz"
PLACES = (..., slice(2, None, 5), slice(1, None, 4))
ROWS, SEED = np.array([7, 8]), 3
# The same for each channel, with draws that do not depend on the number of channels.
CHANNEL_BY_CHANNEL = ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "fog", "brightness", "contrast"]
CHANNEL_BY_CHANNEL += ["elastic_transform", "pixelate"]


def photographs() -> Bytes:
    """Two photographs (2, 3, 32, 32)."""
    parts = [each[:416, :416].reshape(32, 13, 32, 13, 3).mean(axis=(1, 3)) for each in load_sample_images().images]
    return np.stack(parts).astype(np.uint8).transpose(0, 3, 1, 2)


def noise(*shape: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_these_are_the_fifteen_corruptions_in_their_order() -> None:
    with np.load(GOLDEN) as golden:
        assert list(CORRUPTIONS) == golden.files
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_the_published_one_at_every_severity(name: str) -> None:
    with np.load(GOLDEN) as golden:
        expected = golden[name].astype(int)
    for severity in SEVERITIES:
        apart = np.abs(corrupt(photographs(), name, severity, ROWS, SEED)[PLACES] - expected[severity - 1])
        # Single precision there, and 8 bits in between, leave the last level open.
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.08


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_in_the_same_way_whatever_is_beside_it(name: str) -> None:
    images, rows = noise(6, 3, 8, 8), np.array([4, 9, 2, 30, 1, 5])
    together = corrupt(images, name, 4, rows, 0)
    alone = [corrupt(images[at : at + 1], name, 4, rows[at : at + 1], 0) for at in (3, 0, 5)]
    assert np.array_equal(together[[3, 0, 5]], np.concatenate(alone))
    assert not np.array_equal(together, images)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if "noise" in name or name in ("glass_blur", "snow")])
def test_what_is_random_depends_on_image_and_seed(name: str) -> None:
    images = np.repeat(noise(1, 1, 16, 16), 2, axis=0)
    first, second = corrupt(images, name, 3, np.array([0, 1]), 0)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, corrupt(images, name, 3, np.array([0, 1]), 1)[0])


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (1, 28, 28), (3, 24, 40), (3, 64, 64), (3, 150, 30)])
def test_images_of_any_size_are_corrupted(shape: tuple[int, int, int]) -> None:
    images = noise(2, *shape)
    for name in CORRUPTIONS:
        corrupted = corrupt(images, name, 5, ROWS, 0)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == np.uint8
        assert not np.array_equal(corrupted, images)


@pytest.mark.parametrize("name", CHANNEL_BY_CHANNEL)
def test_a_greyscale_image_is_corrupted_like_its_colour_copy(name: str) -> None:
    grey = photographs()[:, 1:2]
    colour = corrupt(np.repeat(grey, 3, axis=1), name, 4, ROWS, 0).astype(int)
    assert np.abs(corrupt(grey, name, 4, ROWS, 0) - colour).max() <= 1


def test_brightness_is_added_to_the_value_of_hsv() -> None:
    images = photographs()
    images[0, :, 0, 0] = 0
    bright = corrupt(images, "brightness", 3, ROWS, 0)
    for row, column in ((0, 0), (5, 9), (20, 31)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(images[0, :, row, column] / 255).tolist())
        expected = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.15)))
        assert np.abs(bright[0, :, row, column] - expected).max() <= 1


def test_glass_blur_moves_pixels_one_by_one_as_a_plain_loop_does() -> None:
    image = photographs()[0]
    draws = np.random.default_rng([SEED, crc32(b"glass_blur"), 5, 7])
    moved = (gaussian_filter(image / 255, (0, 0.4, 0.4), mode="nearest") * 255).astype(np.uint8)
    for _ in range(2):
        moves = iter(draws.integers(-1, 1, size=(900, 2)).tolist())
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                right, down = next(moves)
                moved[:, row, column] = moved[:, row + down, column + right]
    expected = gaussian_filter(moved / 255, (0, 0.4, 0.4), mode="nearest") * 255
    assert np.abs(corrupt(image[None], "glass_blur", 5, ROWS[:1], SEED)[0] - expected).max() <= 1


@pytest.mark.parametrize(("name", "spread"), [("gaussian_noise", 0.08), ("shot_noise", (0.5 / 100) ** 0.5)])
def test_noise_has_its_variance(name: str, spread: float) -> None:
    grey = np.full((4, 3, 64, 64), 128, dtype=np.uint8)
    found = corrupt(grey, name, 3, np.arange(4), 0).astype(float) / 255
    assert found.std() == pytest.approx(spread, rel=0.03)
    assert found.mean() == pytest.approx(0.5, abs=0.005)


def test_motion_blur_repeats_the_edge_so_that_a_flat_image_stays_flat() -> None:
    flat = np.full((3, 1, 8, 8), 77, dtype=np.uint8)
    for name in ("motion_blur", "zoom_blur", "defocus_blur", "elastic_transform", "glass_blur"):
        assert np.abs(corrupt(flat, name, 5, np.arange(3), 0).astype(int) - 77).max() <= 1
