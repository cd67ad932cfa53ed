"""What an inspection finds in a set of which everything is known, and that it is what training would see."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.conftest import encoded, hub
from tla_service.config import DataConfig
from tla_service.data import load_dataset, split_training
from tla_service.data.inspection import Inspection, inspect_dataset
from tla_service.errors import ConfigError, UnavailableError

MakeConfig = Callable[..., DataConfig]
DRAWS = np.random.default_rng(0)


def noise(width: int, height: int, *shape: int) -> np.ndarray:
    return DRAWS.integers(0, 256, (height, width, *shape), np.uint8)


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 cats and 8 dogs, with duplicates, odd sizes, modes and orientations, a damaged image and other files."""
    root = tmp_path_factory.mktemp("messy")
    for name, count in (("cat", 80), ("dog", 8)):
        for number in range(count):
            size = (10 + number, 12) if number < 5 else (40, 30)
            put(root / "train" / name / f"{number:02}.png", encoded(noise(*size, 3)))
        for split in ("test", "val"):
            for number in range(4):
                put(root / split / name / f"{number}.png", encoded(noise(40, 30, 3)))
    put(root / "train" / "dog" / "grey.png", encoded(noise(40, 30)))
    exif = Image.Exif()
    exif[0x0112] = 6
    put(root / "train" / "dog" / "turned.jpg", encoded(noise(40, 30, 3), "JPEG", exif=exif.tobytes()))
    put(root / "train" / "cat" / "01.png", encoded(noise(40, 30, 3))[:300])
    put(root / "test" / "dog" / "again.png", (root / "train" / "cat" / "07.png").read_bytes())
    put(root / "val" / "dog" / "again.bmp", encoded(np.asarray(Image.open(root / "test/dog/0.png")), "BMP"))
    put(root / "train" / "loose.png", encoded(noise(4, 4)))
    put(root / "train" / "cat" / "notes.txt", b"text")
    put(root / "old" / "cat" / "0.png", encoded(noise(4, 4)))
    return root


@pytest.fixture(scope="module")
def inspected(messy: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    cache = str(tmp_path_factory.mktemp("cache"))
    return inspect_dataset(DataConfig(name="image_folder", root=str(messy), cache_dir=cache))


def test_counts_sizes_and_modes(inspected: Inspection, messy: Path) -> None:
    facts = inspected.facts
    assert facts["splits"] == {"train": 90, "validation": 9, "test": 9}
    assert facts["classes"]["dog"] == {"train": 10, "validation": 5, "test": 5}
    assert facts["classes"]["cat"] == {"train": 80, "validation": 4, "test": 4}
    assert facts["validation"] == "a split of its own"
    used = [path for split in ("train", "val", "test") for path in (messy / split).rglob("*/*.*")]
    skipped = (messy / "train/cat/notes.txt", messy / "train/cat/01.png")
    images = [Image.open(io.BytesIO(path.read_bytes())) for path in used if path not in skipped]
    sizes = sorted((image.width * image.height, image.size) for image in images)
    (_, smallest), (_, largest) = sizes[0], sizes[-1]
    assert facts["stored_sizes"]["smallest"] == "{}x{}".format(*smallest)
    assert facts["stored_sizes"]["largest"] == "{}x{}".format(*largest)
    assert facts["stored_sizes"]["median"] == facts["stored_sizes"]["most frequent"] == "40x30"
    assert facts["stored_sizes"]["differing"] == sum(image.size != (40, 30) for image in images)
    assert facts["color_modes"] == {"RGB": 106, "L": 1}
    assert json.loads(json.dumps(facts)) == facts


WARNINGS = [
    "files left out: 1 .png beside the class folders, such as train/loose.png; "
    "1 .txt in class folders that are not images, such as train/cat/notes.txt; "
    "1 .png outside train/, test/, val/, such as old/cat/0.png",
    "the largest class, 'cat' with 80 images, is 8 times the smallest, 'dog' with 10; consider data.balance",
    "data.image_size is not set, which training requires; shown at 64",
    "1 images have an EXIF orientation, which is not applied",
    "1 images are in both train and test, which inflates accuracy: ",
    "1 images are in both validation and test, which inflates accuracy: ",
    "1 images cannot be used: ",
]


@pytest.mark.parametrize("warning", WARNINGS)
def test_each_fault_is_a_warning(inspected: Inspection, warning: str) -> None:
    assert len(inspected.facts["warnings"]) == len(WARNINGS)
    (found,) = [line for line in inspected.facts["warnings"] if warning in line]
    assert f"warning: {found}" in list(inspected.lines())


def test_duplicates_are_named(inspected: Inspection, messy: Path) -> None:
    both = {pair: count for pair, count in inspected.facts["duplicates"].items() if count}
    assert both == {"train and test": 1, "validation and test": 1}
    text = "\n".join(inspected.facts["warnings"])
    assert f"{messy}/test/dog/again.png = {messy}/train/cat/07.png" in text
    assert f"{messy}/test/dog/0.png = {messy}/val/dog/again.bmp" in text


def test_an_image_that_cannot_be_used_is_kept_as_an_error(inspected: Inspection) -> None:
    (error,) = inspected.errors
    assert isinstance(error, UnavailableError)
    assert "train/cat/01.png: not a readable image" in str(error)


def test_the_sheet_shows_what_the_network_sees(inspected: Inspection, messy: Path, make_config: MakeConfig) -> None:
    fields = {"name": "image_folder", "root": str(messy), "image_size": 64, "residency": "stream"}
    source = load_dataset(make_config(**fields)).train
    sheet = np.asarray(inspected.sheet)
    left = sheet.shape[1] - 8 * 68
    for row, first in enumerate((0, 80)):
        # The second cat is damaged, so the third one follows.
        for column, index in enumerate([first, first + (2 if row == 0 else 1)]):
            tile = sheet[row * 68 : row * 68 + 64, left + 68 * column : left + 68 * column + 64]
            assert np.array_equal(tile, source.fetch(torch.tensor([index]))[0].permute(1, 2, 0).numpy())


def test_digits(make_config: MakeConfig) -> None:
    config = make_config()
    found = inspect_dataset(config, seed=3)
    dataset = load_dataset(config)
    rows, (_, validation) = split_training(dataset, 0.1, 3)
    assert found.facts["splits"] == {"train": len(rows), "validation": len(validation), "test": 450}
    assert found.facts["classes"]["7"]["validation"] == int((dataset.train.labels[validation] == 7).sum())
    assert found.facts["validation"] == "held out of the training images (data.validation_fraction=0.1)"
    assert found.facts["fingerprint"] == dataset.fingerprint
    assert found.facts["warnings"] == found.errors == []
    assert found.sheet.size[1] == 10 * 76 + 24  # 8x8 pixels nine times as large


def test_extra_images_are_counted_and_their_leaks_are_warnings(tmp_path: Path, make_config: MakeConfig) -> None:
    test = load_dataset(make_config()).test.fetch(torch.arange(2))[:, 0].numpy()
    np.savez(tmp_path / "extra.npz", image=np.concatenate([test, noise(8, 5, 8)]), label=np.arange(7))
    found = inspect_dataset(make_config(extra={"path": str(tmp_path / "extra.npz")}))
    assert (found.facts["extra"]["extra_images"], found.facts["extra"]["extra_duplicates_left_out"]) == ("5", "2")
    (warning,) = found.facts["warnings"]
    assert "2 of its 7 images are near-duplicates of validation or test images: row 0 = test image 0" in warning


def test_parquet_files_of_several_sizes(tmp_path: Path, make_config: MakeConfig) -> None:
    blobs = [encoded(noise(6, 6, 3)) for _ in range(11)] + [encoded(noise(7, 9, 3))]
    root = hub(tmp_path / "hub", blobs, train={"label": ["a", "b"] * 6}, test={"label": ["a", "b"]})
    config = make_config(name="parquet", root=root)
    found = inspect_dataset(config)
    (error,) = found.errors
    assert isinstance(error, ConfigError)
    assert "row 11 has 7x9 pixels, others 6x6; give the side to resize all to" in str(error)
    resized = inspect_dataset(config.model_copy(update={"image_size": 8}))
    assert resized.errors == []
    assert resized.facts["duplicates"]["train and test"] == 2


def test_many_classes_fit_on_the_sheet(tmp_path: Path, make_config: MakeConfig) -> None:
    labels = [f"a class with a rather long name, number {number:03}" for number in range(50)] * 2
    root = hub(tmp_path / "hub", [encoded(noise(9, 9))], train={"label": labels}, test={"label": labels})
    found = inspect_dataset(make_config(name="parquet", root=root, validation_fraction=0.5))
    assert len(found.facts["classes"]) == 50
    assert found.sheet.size[1] == 40 * 76 + 24
    assert found.sheet.size[0] < 320 + 8 * 76 + 1


def test_names_that_are_no_text(tmp_path: Path, make_config: MakeConfig) -> None:
    for split in ("train", "test"):
        for name in ("cat", "a\ndog", os.fsdecode(b"x\xe9"), os.fsdecode(b"x\xe8")):
            for number in range(10):
                put(tmp_path / "root" / split / name / f"{number}.png", encoded(noise(9, 9)))
    found = inspect_dataset(make_config(name="image_folder", root=str(tmp_path / "root"), image_size=200))
    assert [*found.facts["classes"]] == ["a dog", "cat", "x? (class 2)", "x? (class 3)"]
    assert found.sheet.size[1] == 4 * (128 + 4) + 24
    "\n".join(found.lines()).encode()
