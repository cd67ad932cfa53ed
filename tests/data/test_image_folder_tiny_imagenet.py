"""Tiny ImageNet: the real subset, small ones, damaged ones, annotations made of rubbish."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.data.image_folder import parse_annotations
from tla_service.data.sources import ArraySource, FileSource
from tla_service.errors import ConfigError, UnavailableError

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def folder(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """Three classes with 4 training and 2 test images each, one of them grey."""
    root = tmp_path / "set" / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n03\nn01\nn02\n")
    (root / "words.txt").write_text("n01\tcat, house cat\nn02\tdog\nn03\tdog\nn04\tother\n")
    lines = []
    for number, wnid in enumerate(("n01", "n02", "n03")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for place in range(4):
            shape = (8, 8) if place == 0 else (8, 8, 3)
            pixels = np.full(shape, 60 * number + 10 * place, np.uint8)
            (root / "train" / wnid / "images" / f"{wnid}_{place}.JPEG").write_bytes(encoded(pixels, "JPEG"))
        for place in range(2):
            name = f"val_{9 - 2 * number - place}.JPEG"
            lines.append(f"{name}\t{wnid}\t0\t0\t7\t7")
            (root / "val" / "images" / name).write_bytes(encoded(np.full((8, 8, 3), 200, np.uint8), "JPEG"))
    lines.append("unused.JPEG\tn04\t0\t0\t7\t7")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "set"


def zipped(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder.parent / "tiny-imagenet-small"), "zip", folder))


@pytest.mark.slow
def test_the_real_subset_straight_from_its_zip_file(real_data: Path, shared_cache: str) -> None:
    root = str(real_data / "tiny-imagenet-20-classes.zip")
    kept = load_dataset(DataConfig(name="tiny_imagenet", root=root, cache_dir=shared_cache))
    streamed = load_dataset(DataConfig(name="tiny_imagenet", root=root, cache_dir=shared_cache, residency="stream"))

    assert (len(kept.train), len(kept.test), kept.image_shape) == (10_000, 1000, (3, 64, 64))
    assert set(kept.train.labels.bincount().tolist()) == {500}
    assert set(kept.test.labels.bincount().tolist()) == {50}
    assert len(set(kept.class_names)) == 20
    assert kept.class_names[0] == "goldfish"
    assert isinstance(kept.train, ArraySource)
    assert isinstance(streamed.train, FileSource)
    rows = torch.arange(0, 10_000, 97)
    assert torch.equal(kept.train.fetch(rows), streamed.train.fetch(rows))
    assert torch.equal(kept.train.labels, streamed.train.labels)


def test_the_test_set_is_val_in_the_order_of_its_annotations(folder: Path, make_config: MakeConfig) -> None:
    found = load_dataset(make_config(name="tiny_imagenet", root=str(folder)))
    assert found.class_names == ("cat", "n02", "n03")
    assert found.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    means = found.train.fetch(torch.arange(12)).float().mean((1, 2, 3)).round().int().tolist()
    assert means == [60 * number + 10 * place for number in range(3) for place in range(4)]


def test_every_place_of_the_files_gives_the_same(folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    archive = zipped(folder)
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(archive, beside)
    roots = [folder, folder / "tiny-imagenet-200", archive, beside]
    found = [load_dataset(make_config(name="tiny_imagenet", root=str(root))) for root in roots]
    assert len({item.fingerprint for item in found}) == 1


def test_several_sets_in_one_root_are_refused(folder: Path, make_config: MakeConfig) -> None:
    shutil.copytree(folder / "tiny-imagenet-200", folder / "old" / "set")
    with pytest.raises(ConfigError, match=r"data\.root=.*: holds 2 data sets: old/set, tiny-imagenet-200; point it at"):
        load_dataset(make_config(name="tiny_imagenet", root=str(folder)))


def test_images_in_a_zip_file_stream_as_they_are_kept(folder: Path, make_config: MakeConfig) -> None:
    archive = str(zipped(folder))
    kept = load_dataset(make_config(name="tiny_imagenet", root=archive))
    streamed = load_dataset(make_config(name="tiny_imagenet", root=archive, residency="stream"))
    assert isinstance(kept.train, ArraySource)
    assert isinstance(streamed.train, FileSource)
    rows = torch.arange(len(kept.train))
    assert torch.equal(kept.train.fetch(rows), streamed.train.fetch(rows))
    assert torch.equal(kept.train.labels, streamed.train.labels)


def test_a_smaller_side(folder: Path, make_config: MakeConfig) -> None:
    assert load_dataset(make_config(name="tiny_imagenet", root=str(folder), image_size=4)).image_shape == (3, 4, 4)


def test_a_class_without_images_is_refused(folder: Path, make_config: MakeConfig) -> None:
    shutil.rmtree(folder / "tiny-imagenet-200" / "train" / "n02")
    with pytest.raises(ConfigError, match=r"data\.name=tiny_imagenet: 1 of the 3 classes .* n02 first"):
        load_dataset(make_config(name="tiny_imagenet", root=str(folder)))


@pytest.mark.parametrize("missing", ["wnids.txt", "val/val_annotations.txt", "val/images/val_9.JPEG"])
def test_a_missing_file_is_named(folder: Path, make_config: MakeConfig, missing: str) -> None:
    (folder / "tiny-imagenet-200" / missing).unlink()
    with pytest.raises(UnavailableError, match=rf"data\.root=.*{missing.split('/')[-1]}"):
        load_dataset(make_config(name="tiny_imagenet", root=str(folder)))


def test_a_damaged_zip_file_is_named(folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    archive = zipped(folder)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnavailableError, match=r"data\.root=.*tiny-imagenet-small\.zip: not a readable zip file"):
        load_dataset(make_config(name="tiny_imagenet", root=str(archive)))


def test_a_damaged_member_is_named(folder: Path, make_config: MakeConfig) -> None:
    archive = zipped(folder)
    name = "tiny-imagenet-200/train/n02/images/n02_2.JPEG"
    with zipfile.ZipFile(archive) as opened:
        offset = opened.getinfo(name).header_offset
    content = bytearray(archive.read_bytes())
    place = offset + 30 + len(name) + 40
    content[place : place + 20] = bytes(20)
    archive.write_bytes(content)
    with pytest.raises(UnavailableError, match=r"n02_2\.JPEG: damaged"):
        load_dataset(make_config(name="tiny_imagenet", root=str(archive)))


@given(st.text(alphabet="ab./\t\n\r \0é", max_size=60))
def test_rubbish_annotations_are_refused_or_read_line_by_line(text: str) -> None:
    numbers = {"a": 0, "b": 1}
    try:
        found = parse_annotations(text, numbers, "val_annotations.txt")
    except UnavailableError as error:
        assert "val_annotations.txt" in str(error)
        return
    expected = []
    for line in text.split("\n"):
        if line.strip():
            fields = line.split("\t")
            assert "/" not in fields[0]
            if fields[1].strip() in numbers:
                expected.append((fields[0], numbers[fields[1].strip()]))
    assert found == expected


@pytest.mark.parametrize("line", ["x.JPEG", "x.JPEG n01", "\tn01", "../x.JPEG\tn01", "x.JPEG\t\t3"])
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(UnavailableError, match=r"val_annotations\.txt, line 2: is not"):
        parse_annotations(f"good.JPEG\tn01\t0\n{line}\n", {"n01": 0}, "val_annotations.txt")
