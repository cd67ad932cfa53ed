"""Near-duplicates against plain loops, and on real photographs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tla_service.data import ArraySource, load_dataset
from tla_service.data import duplicates as module
from tla_service.data.duplicates import NEAR, near_duplicates


def source(images: torch.Tensor) -> ArraySource:
    return ArraySource(images, torch.zeros(len(images)))


def smooth(count: int, height: int = 20, width: int = 17, channels: int = 3) -> torch.Tensor:
    """Images with shapes of a few pixels, as photographs have."""
    draws = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    return (255 * torch.nn.functional.interpolate(draws, (height, width), mode="bicubic").clamp(0, 1)).byte()


def shifted(images: torch.Tensor, x: int, y: int) -> torch.Tensor:
    return torch.nn.functional.pad(images, (4, 4, 4, 4))[:, :, 4 + y :, 4 + x :][
        :, :, : images.shape[2], : images.shape[3]
    ]


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Of the unit vectors, from the correlation coefficient."""
    return float(np.sqrt(max(0, 2 - 2 * np.corrcoef(first.flatten(), second.flatten())[0, 1])))


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The means of 6x6 cells, which overlap where 6 does not divide the size."""
    _, height, width = image.shape
    small = np.empty((len(image), 6, 6))
    for row, column in np.ndindex(6, 6):
        rows = slice(row * height // 6, -(-(row + 1) * height // 6))
        columns = slice(column * width // 6, -(-(column + 1) * width // 6))
        small[:, row, column] = image[:, rows, columns].mean((1, 2))
    return small


def by_loops(images: np.ndarray, references: np.ndarray) -> dict[int, tuple[int, float]]:
    """The nearest reference by thumbnails, mirrored or not, and its distance over all shifts by a pixel."""
    found = {}
    _, _, height, width = images.shape
    for row, image in enumerate(images):
        candidates = [(place, copy) for place, other in enumerate(references) for copy in (other, other[:, :, ::-1])]
        place, nearest = min(candidates, key=lambda item: distance(thumbnail(image), thumbnail(item[1])))
        center = image[:, 1 : height - 1, 1 : width - 1]
        windows = [nearest[:, y : y + height - 2, x : x + width - 2] for y, x in np.ndindex(3, 3)]
        found[row] = (place, min(distance(center, window) for window in windows))
    return found


def test_the_nearest_reference_and_its_distance_are_those_of_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 5)
    monkeypatch.setattr(module, "_READ", 3 * 3 * 20 * 17)
    images = smooth(24)
    noise = 60 * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    known, copies = images[:9], (images.flip(3) / 2 + noise).byte()
    asked = torch.cat([copies[3:8], shifted(images[:4], 1, -1), images[9:14], shifted(images[5:8], 0, 2)])
    expected = by_loops(asked.double().numpy(), known.double().numpy())
    assert {near < NEAR for _, near in expected.values()} == {True, False}

    for limit in (NEAR, 3.0):
        monkeypatch.setattr(module, "NEAR", limit)
        validation, test = source(images[:4]), source(torch.cat([images[:3], images[4:9]]))
        found = near_duplicates(source(asked), [(validation, torch.arange(4)), (test, torch.arange(3, 8))])
        wanted = {row: pair for row, pair in expected.items() if pair[1] < limit}
        assert found["rows"].tolist() == [*wanted]
        assert found["references"].tolist() == [place for place, _ in wanted.values()]
        distances = [near for _, near in wanted.values()]
        np.testing.assert_allclose(found["distances"].numpy(), distances, atol=5e-3)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (64, 64, 3), (40, 9, 3)])
def test_copies_are_found_at_any_size_and_others_are_not(shape: tuple[int, int, int]) -> None:
    images = smooth(40, *shape)
    found = near_duplicates(source(images[5:]), [(source(images[:20].flip(3)), torch.arange(0, 20, 2))])
    assert found["rows"].tolist() == [*range(1, 15, 2)]
    assert found["references"].tolist() == [*range(3, 10)]
    assert (found["distances"] < 0.05).all()


def test_plain_images_are_near_nothing() -> None:
    plain = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)
    assert not len(near_duplicates(source(plain), [(source(plain), torch.arange(2))])["rows"])


@pytest.mark.slow
def test_photographs(real_data: Path, shared_cache: str) -> None:
    """As the documentation says: copies of CIFAR-10's test images are found, and few of its training images."""
    from tla_service.config import DataConfig

    cifar = load_dataset(DataConfig(name="cifar10", root=str(real_data / "cifar10"), cache_dir=shared_cache))
    images = cifar.test.fetch(torch.arange(300))

    def jpeg(image: torch.Tensor) -> torch.Tensor:
        handle = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(handle, "JPEG", quality=75)
        return torch.from_numpy(np.array(Image.open(handle))).permute(2, 0, 1)

    recompressed = torch.stack([*map(jpeg, images)])
    brighter = (images.float() + 40).clamp(max=255).byte()
    for copies, least in ((images.flip(3), 300), (shifted(images, 1, 0), 297), (brighter, 297), (recompressed, 279)):
        found = near_duplicates(source(copies), [(cifar.test, torch.arange(len(cifar.test)))])
        assert (found["rows"] == found["references"]).sum() >= least
    training = near_duplicates(cifar.train.subset(torch.arange(5000)), [(cifar.test, torch.arange(len(cifar.test)))])
    assert 1 <= len(training["rows"]) <= 15
