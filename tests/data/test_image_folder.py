"""Folders of images."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.errors import ConfigError, UnavailableError

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def folder(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """Two classes, images of several sizes and kinds, one of them in a folder of its own."""
    root = tmp_path / "pictures"
    for part, count in (("train", 4), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            (root / part / name / "more").mkdir(parents=True)
            for place in range(count):
                pixels = np.full((10 + place, 14, 3), 100 * number + 10 * place, np.uint8)
                where = root / part / name / ("more" if place == 0 else "")
                kind = "PNG" if place % 2 else "BMP"
                (where / f"{place}.{kind.lower()}").write_bytes(encoded(pixels, kind))
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / ".hidden").mkdir()
    return root


def test_class_folders(folder: Path, make_config: MakeConfig) -> None:
    found = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    assert found.class_names == ("cat", "dog")
    assert found.image_shape == (3, 6, 6)
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    values = found.train.fetch(torch.arange(8))[:, 0, 0, 0].tolist()
    assert values == [10, 20, 30, 0, 110, 120, 130, 100]


def test_val_zip_files_and_streaming_give_the_same(folder: Path, make_config: MakeConfig) -> None:
    plain = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    archive = shutil.make_archive(str(folder.parent / "packed"), "zip", folder.parent, folder.name)
    (folder / "test").rename(folder / "val")
    others = [
        load_dataset(make_config(name="image_folder", root=root, image_size=6, residency=residency))
        for root, residency in ((str(folder), "auto"), (archive, "auto"), (str(folder), "stream"), (archive, "stream"))
    ]
    for other in others:
        assert torch.equal(other.train.fetch(torch.arange(8)), plain.train.fetch(torch.arange(8)))
        assert torch.equal(other.test.labels, plain.test.labels)
    assert others[0].fingerprint == others[1].fingerprint == plain.fingerprint


def test_a_side_is_needed(folder: Path, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size: .*give a side"):
        load_dataset(make_config(name="image_folder", root=str(folder)))


def test_an_empty_class_is_refused(folder: Path, make_config: MakeConfig) -> None:
    (folder / "train" / "eel").mkdir()
    with pytest.raises(ConfigError, match=r"data\.name=image_folder: class 'eel' has no training images"):
        load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))


def test_one_class_only_is_refused(folder: Path, make_config: MakeConfig) -> None:
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "dog")
    with pytest.raises(ConfigError, match=r"data\.name=image_folder: has one class only"):
        load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))


def test_wrong_layouts_are_refused(folder: Path, make_config: MakeConfig) -> None:
    config = make_config(name="image_folder", root=str(folder), image_size=6)
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(UnavailableError, match=r"data\.root=.*test/wolf: has no folder of this name under train"):
        load_dataset(config)
    shutil.rmtree(folder / "test")
    with pytest.raises(UnavailableError, match="no test/ or val/ beside it"):
        load_dataset(config)
    shutil.rmtree(folder / "train")
    with pytest.raises(UnavailableError, match="no train/ folder"):
        load_dataset(config)


def test_a_damaged_image_is_named(folder: Path, make_config: MakeConfig) -> None:
    (folder / "train" / "dog" / "3.png").write_bytes(b"\x89PNG rubbish")
    with pytest.raises(UnavailableError, match=r"data\.root=.*dog/3\.png: not a readable image"):
        load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))


def test_a_changed_image_is_decoded_again(folder: Path, make_config: MakeConfig, encoded: Callable[..., bytes]) -> None:
    config = make_config(name="image_folder", root=str(folder), image_size=6)
    before = load_dataset(config)
    (folder / "train" / "dog" / "3.png").write_bytes(encoded(np.full((13, 14, 3), 255, np.uint8)))
    after = load_dataset(config)
    assert after.train.fetch(torch.tensor([6])).unique().tolist() == [255]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("change", ["rename", "grow", "content"])
def test_a_streamed_folders_fingerprint(
    folder: Path, make_config: MakeConfig, encoded: Callable[..., bytes], change: str
) -> None:
    config = make_config(name="image_folder", root=str(folder), image_size=6, residency="stream")
    before = load_dataset(config).fingerprint
    path = folder / "train" / "cat" / "2.bmp"
    if change == "rename":
        path.rename(path.with_name("2b.bmp"))
    elif change == "grow":
        path.write_bytes(path.read_bytes() + b" ")
    else:
        same_size = bytearray(path.read_bytes())
        same_size[-1] ^= 1
        path.write_bytes(same_size)
    assert load_dataset(config).fingerprint != before
