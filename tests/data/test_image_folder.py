"""Folders of images."""

import logging
import shutil
import unicodedata
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
    (folder / "all.tar.gz").touch()
    with pytest.raises(UnavailableError, match=r"no train/ folder with files in it, but all\.tar\.gz; unpack all"):
        load_dataset(config)
    with pytest.raises(UnavailableError, match=r"not a readable zip file \(.*\); unpack it, and point data\.root"):
        load_dataset(config.model_copy(update={"root": str(folder / "all.tar.gz")}))


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.jfif", "JPEG"), ("x.jpe", "JPEG"), ("x", "PNG"), ("x.png ", "PNG"), ("x.png.1", "PNG"), ("x.avif", "AVIF"),
        ("x.jp2", "JPEG2000"), ("x.dib", "BMP"), ("x.pnm", "PPM"), ("x.bak", "TIFF"), ("x.image", "GIF"),
        ("x.unknown", "WEBP"), ("0a1b2c", "JPEG"), ("PHOTO.JPG_large", "JPEG"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_images_are_recognised_by_their_content(
    folder: Path, make_config: MakeConfig, encoded: Callable[..., bytes], name: str, kind: str, packed: bool
) -> None:
    (folder / "train" / "dog" / name).write_bytes(encoded(np.full((8, 8, 3), 255, np.uint8), kind))
    root = shutil.make_archive(str(folder), "zip", folder) if packed else str(folder)
    found = load_dataset(make_config(name="image_folder", root=root, image_size=6))
    assert found.train.labels.tolist() == [0] * 4 + [1] * 5
    assert float(found.train.fetch(torch.arange(9)).float().mean((1, 2, 3)).max()) > 250


@pytest.mark.parametrize(
    "content", [b"", b"P", b"Python is no image", b"BMW has no image either", b"text", bytes(100), b"\x89PN", b"II*"]
)
def test_what_is_no_image_is_counted_by_ending(
    folder: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (folder / "train" / "cat" / "notes").write_bytes(content)
    (folder / "test" / "cat" / "x.heic").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    assert (len(found.train), len(found.test)) == (8, 4)
    expected = "1 without ending, 1 .txt, 1 .heic in class folders that are not images, such as train/cat/notes"
    assert caplog.messages == [f"data.root={folder}: files left out: {expected}"]


def test_files_beside_and_outside_the_class_folders_are_counted(
    folder: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "train" / "cat" / "notes.txt").unlink()
    image = (folder / "train" / "dog" / "1.png").read_bytes()
    for name in ("train/loose.png", "train/labels.csv", "test/loose.PNG", "extra/cat/1.png", "other.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    (folder / "README.md").write_text("text")
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset(make_config(name="image_folder", root=str(folder), image_size=6)).train) == 8
    beside, outside = "2 .png, 1 .csv beside the class folders", "2 .png outside train/, test/"
    expected = f"{beside}, such as train/labels.csv; {outside}, such as extra/cat/1.png"
    assert caplog.messages == [f"data.root={folder}: files left out: {expected}"]


def test_nothing_is_said_of_a_tidy_set(folder: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train" / "cat" / "notes.txt").unlink()
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    assert caplog.messages == []


@pytest.mark.parametrize("places", [("digits", "letters"), (".", "old"), ("a/b", "a/c"), ("x", "y/z")])
@pytest.mark.parametrize("packed", [False, True])
def test_several_sets_in_one_root_are_refused(
    folder: Path, make_config: MakeConfig, tmp_path: Path, places: tuple[str, str], packed: bool
) -> None:
    for place in places:
        shutil.copytree(folder, tmp_path / "root" / place, dirs_exist_ok=True)
    root = str(tmp_path / "root")
    root = shutil.make_archive(root, "zip", root) if packed else root
    with pytest.raises(ConfigError, match=rf"data\.root=.*: holds 2 data sets: {places[0]}, {places[1]}; point it at"):
        load_dataset(make_config(name="image_folder", root=root, image_size=6))


def test_a_set_may_lie_deeper_and_beside_incomplete_ones(folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    expected = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    shutil.copytree(folder, tmp_path / "root" / "a" / "b")
    shutil.copytree(folder / "train", tmp_path / "root" / "extra" / "train")
    found = load_dataset(make_config(name="image_folder", root=str(tmp_path / "root"), image_size=6))
    assert found.fingerprint == expected.fingerprint


def test_classes_may_be_called_train_and_test(folder: Path, make_config: MakeConfig) -> None:
    for part in ("train", "test"):
        (folder / part / "cat").rename(folder / part / "train")
        (folder / part / "dog").rename(folder / part / "test")
    found = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    assert found.class_names == ("test", "train")
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("spelling", ["val", "validation", "valid", "dev"])
@pytest.mark.parametrize("unlabelled", [None, "loose", "folder"])
def test_without_test_labels_the_validation_folder_is_used(
    folder: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, spelling: str, unlabelled: str | None
) -> None:
    expected = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    (folder / "test").rename(folder / spelling)
    caplog.clear()
    if unlabelled is not None:
        place = folder / "test" / ("unknown" if unlabelled == "folder" else "")
        place.mkdir(parents=True)
        shutil.copy(folder / "train" / "dog" / "1.png", place)
    found = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    assert found.fingerprint == expected.fingerprint
    said = f"{folder}/test has no images in the class folders of train/; testing on {spelling}/ instead"
    assert (said in caplog.messages) == (unlabelled is not None)


def test_a_test_set_without_labels_alone_is_refused(folder: Path, make_config: MakeConfig) -> None:
    shutil.rmtree(folder / "test")
    (folder / "test").mkdir()
    shutil.copy(folder / "train" / "dog" / "1.png", folder / "test")
    with pytest.raises(
        UnavailableError, match=r"/test: holds no images in class folders; .*or hold .*data\.test_fraction=0\.2"
    ):
        load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))


def test_classes_are_matched_by_name_and_missing_ones_are_said(
    folder: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(folder / "test" / "cat")
    found = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    assert found.test.labels.tolist() == [1, 1]
    assert f"data.root={folder}: 1 classes have no test images: cat" in caplog.messages


def test_spellings_of_one_accent_are_one_class(folder: Path, make_config: MakeConfig) -> None:
    (folder / "train" / "cat").rename(folder / "train" / unicodedata.normalize("NFC", "café"))
    (folder / "test" / "cat").rename(folder / "test" / unicodedata.normalize("NFD", "café"))
    found = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    assert found.class_names == ("café", "dog")
    assert found.test.labels.tolist() == [0, 0, 1, 1]


def test_classes_that_differ_only_in_case_are_said(
    folder: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder / "train" / "dog", folder / "train" / "Dog")
    shutil.copytree(folder / "test" / "dog", folder / "test" / "Dog")
    assert load_dataset(make_config(name="image_folder", root=str(folder), image_size=6)).class_names[0] == "Dog"
    assert f"data.root={folder}: classes 'Dog' and 'dog' differ only in case or spaces" in caplog.messages


def test_a_link_to_nothing_is_refused_before_anything_is_decoded(folder: Path, make_config: MakeConfig) -> None:
    (folder / "train" / "dog" / "9.png").symlink_to("../../.git/annex/objects/9.png")
    with pytest.raises(UnavailableError, match=r"dog/9\.png: is a link to a file that is not there; restore what"):
        load_dataset(make_config(name="image_folder", root=str(folder), image_size=6, residency="stream"))


def test_the_fingerprint_is_that_of_earlier_versions(folder: Path, make_config: MakeConfig) -> None:
    # A run that was stopped before files were recognised by content must resume.
    found = load_dataset(make_config(name="image_folder", root=str(folder), image_size=6))
    assert found.fingerprint == "0919a1537788d254"


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
