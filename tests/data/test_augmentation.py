"""Crops, flips and saturation against plain loops."""

import pytest
import torch

from tla_service.config import DataConfig
from tla_service.data.augmentation import augment, to_unit


def pictures(count: int = 40, channels: int = 3, height: int = 6, width: int = 5) -> torch.Tensor:
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=seeded(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_crops(image: torch.Tensor, padding: int, *, flip: bool) -> list[list[float]]:
    """Every image that padding, cropping and flipping can give, by plain loops."""
    channels, height, width = image.shape
    results = []
    for top in range(-padding, padding + 1):
        for left in range(-padding, padding + 1):
            for mirrored in (False, True) if flip else (False,):
                result = torch.zeros(channels, height, width)
                for row in range(height):
                    for column in range(width):
                        source = left + (width - 1 - column if mirrored else column)
                        if 0 <= row + top < height and 0 <= source < width:
                            result[:, row, column] = image[:, row + top, source] / 255
                results.append(result.flatten().tolist())
    return results


def test_nothing_asked_for_only_scales() -> None:
    images = pictures()
    assert torch.equal(augment(images, DataConfig(), seeded()), images.float() / 255)
    assert to_unit(images).dtype == torch.float32


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (2, False), (1, True)])
def test_every_image_is_a_crop_of_itself_and_all_crops_occur(padding: int, flip: bool) -> None:
    image = pictures(1)[0]
    count = 30 * (2 * padding + 1) ** 2 * 2
    done = augment(image.expand(count, -1, -1, -1), DataConfig(crop_padding=padding, flip=flip), seeded())

    possible = all_crops(image, padding, flip=flip)
    seen = [possible.index(result.flatten().tolist()) for result in done]
    assert set(seen) == set(range(len(possible)))
    assert max(seen.count(place) for place in set(seen)) < 3 * count / len(possible)


def test_images_of_a_batch_are_augmented_apart_and_the_input_is_kept() -> None:
    images = pictures(1).expand(64, -1, -1, -1)
    before = images.clone()
    done = augment(images, DataConfig(crop_padding=2, flip=True), seeded())

    assert len({tuple(result.flatten().tolist()) for result in done}) > 20
    assert torch.equal(images, before)


def test_saturation_moves_pixels_on_the_line_through_their_grey() -> None:
    images = pictures(200)
    done = augment(images, DataConfig(saturation=2.0), seeded())

    unit = images.float() / 255
    grey = 0.299 * unit[:, 0] + 0.587 * unit[:, 1] + 0.114 * unit[:, 2]
    factors = []
    for image, result, level in zip(unit, done, grey, strict=True):
        inside = (result > 0) & (result < 1) & ((image - level).abs() > 0.1)
        ratio = ((result - level) / (image - level))[inside]
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), atol=1e-4)
        factors.append(float(ratio[0]))
    assert 0.5 <= min(factors) < 0.6
    assert 1.9 < max(factors) <= 2.0
    assert done.min() >= 0
    assert done.max() <= 1


def test_saturation_leaves_grey_sets_alone() -> None:
    images = pictures(channels=1)
    assert torch.equal(augment(images, DataConfig(saturation=2.0), seeded()), images.float() / 255)
