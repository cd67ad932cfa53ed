"""Splits that are found by usual names, named by settings, or held out; folders and Parquet files alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.conftest import encoded, hub
from tla_service.config import DataConfig
from tla_service.data import Dataset, load_dataset, split_training
from tla_service.errors import ConfigError, UnavailableError

MakeConfig = Callable[..., DataConfig]
Write = Callable[..., Callable[..., Dataset]]


@pytest.fixture(params=["image_folder", "zip", "parquet", "parquet in folders"])
def write(request: pytest.FixtureRequest, tmp_path: Path, make_config: MakeConfig) -> Write:
    """Writes splits of so many images each, all of a split with one grey level, in two classes; returns a loader."""
    kind = request.param

    def written(**splits: int) -> Callable[..., Dataset]:
        root = tmp_path / "root"
        for level, (name, count) in enumerate(splits.items()):
            blobs = [encoded(np.full((8, 8), 10 * level, np.uint8)) for _ in range(count)]
            if kind.startswith("parquet"):
                folders = kind == "parquet in folders"
                split = hub(root / name if folders else root, blobs, **{"0" if folders else name: labels_of(count)})
                assert Path(split).is_dir()
            else:
                for number, blob in enumerate(blobs):
                    path = root / name / ["cat", "dog"][number % 2] / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(blob)
        if kind == "zip":
            import shutil

            root = Path(shutil.make_archive(str(root), "zip", root))
        name = "image_folder" if kind == "zip" else kind.partition(" ")[0]
        return lambda **fields: load_dataset(make_config(name=name, root=str(root), image_size=4, **fields))

    def labels_of(count: int) -> dict[str, list[str]]:
        return {"label": ["cat", "dog"] * (count // 2)}

    return written


def contents(dataset: Dataset) -> dict[str, tuple[int, list[int]]]:
    """Number of images, and their grey levels, by split."""
    found = {}
    named = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
    for name, source in named.items():
        if source is None:
            continue
        found[name] = (len(source), source.fetch(torch.arange(len(source))).unique().tolist())
    return found


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev"])
@pytest.mark.parametrize("residency", ["auto", "stream"])
def test_a_validation_split_beside_a_test_split_is_validated_on(write: Write, name: str, residency: str) -> None:
    load = write(train=8, test=4, **{name: 6})
    found = load(residency=residency)
    assert contents(found) == {"train": (8, [0]), "test": (4, [10]), "validation": (6, [20])}
    rows, (source, validation) = split_training(found, 0.25, 0)
    assert rows.tolist() == list(range(8))
    assert source is found.validation
    assert validation.tolist() == list(range(6))
    # The setting for what runs of earlier versions did: a share of the training images.
    held_out = load(residency=residency, validation="")
    assert contents(held_out) == {"train": (8, [0]), "test": (4, [10])}
    rows, (source, validation) = split_training(held_out, 0.25, 0)
    assert source is held_out.train
    assert sorted([*rows.tolist(), *validation.tolist()]) == list(range(8))
    assert held_out.fingerprint == found.fingerprint  # of training and test images, as evaluations know it


def test_a_validation_split_alone_is_tested_on(write: Write) -> None:
    assert contents(write(train=8, val=4)()) == {"train": (8, [0]), "test": (4, [10])}


def test_splits_are_named(write: Write) -> None:
    load = write(Training=8, first=4, second=6, test=2)
    found = load(train="Training", validation="first", test="second")
    assert contents(found) == {"train": (8, [0]), "validation": (4, [10]), "test": (6, [20])}
    assert contents(load(train="Training", validation="first")) == {
        "train": (8, [0]),
        "validation": (4, [10]),
        "test": (2, [30]),
    }


def test_a_named_split_may_begin_like_a_usual_one(write: Write) -> None:
    found = write(train=8, **{"train-more": 4, "test-hard": 6})(train="train-more", test="test-hard")
    assert contents(found) == {"train": (4, [10]), "test": (6, [20])}


def test_a_test_split_is_held_out(write: Write) -> None:
    load = write(train=20, val=4)
    assert contents(load()) == {"train": (20, [0]), "test": (4, [10])}  # the same files, in the cache under other names
    found = load(test_fraction=0.2)
    assert contents(found) == {"train": (16, [0]), "test": (4, [0]), "validation": (4, [10])}
    assert found.test.labels.tolist().count(0) == 2
    assert load(test_fraction=0.2, residency="stream").test.labels.tolist() == found.test.labels.tolist()


def test_no_test_split_says_how_to_name_or_hold_out_one(write: Write) -> None:
    remedy = r"name one by data\.test, or hold a share of the training images out by data\.test_fraction=0\.2"
    with pytest.raises(UnavailableError, match=rf"has train.* but no test.*; {remedy}"):
        write(train=8, holdout=4)()
    with pytest.raises(UnavailableError, match=rf"has train.* but no test.*; {remedy}"):
        write(train=8, val=4)(validation="val")


def test_other_names_are_listed(write: Write) -> None:
    load = write(Training=8, Testing=4)
    with pytest.raises(UnavailableError, match=r"no train.*, but Testing, Training; .*data\.train .*and data\.test"):
        load()
    assert contents(load(train="Training", test="Testing")) == {"train": (8, [0]), "test": (4, [10])}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such training split": (
        {"train": "Train"},
        r"data\.train=Train: no such split in .*; give one of: .*test, train",
    ),
    "no such test split": ({"test": "tests"}, r"data\.test=tests: no such split in .*; give one of: .*test, train"),
    "no such validation split": ({"validation": "x"}, r"data\.validation=x: no such split in .*; give one of: "),
    "the training split": (
        {"test": "train"},
        r"data\.test=train: is data\.train, too; give splits with",
    ),
    "one for two": ({"test": "val", "validation": "val"}, r"data\.test=val: is data\.validation, too"),
    "both": (
        {"test": "val", "test_fraction": 0.2},
        r"data\.test_fraction=0\.2: data\.test names the test set; give only",
    ),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_names_are_refused(write: Write, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(train=8, test=4, val=4)(**fields)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders in the root, with no splits, and one of images to keep."""
    for level, (name, count) in enumerate({"cat": 10, "dog": 10, "holdout/cat": 2, "holdout/dog": 2}.items()):
        (tmp_path / "root" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "root" / name / f"{number}.png").write_bytes(encoded(np.full((8, 8), 10 * level, np.uint8)))
    return tmp_path / "root"


def test_class_folders_without_a_training_folder(
    classes: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(name="image_folder", root=str(classes), image_size=4)
    with pytest.raises(
        UnavailableError, match=r"no train/ folder with files in it, but cat, dog, holdout; .*data\.train"
    ):
        load_dataset(config)
    found = load_dataset(config.model_copy(update={"train": ".", "test": "holdout"}))
    assert (len(found.train), len(found.test), found.class_names) == (20, 4, ("cat", "dog"))
    found = load_dataset(config.model_copy(update={"train": ".", "test_fraction": 0.25}))
    assert (len(found.train), len(found.test), found.class_names) == (18, 6, ("cat", "dog", "holdout"))
    (classes / "held").mkdir()
    (classes / "holdout").rename(classes / "held" / "out")
    found = load_dataset(config.model_copy(update={"train": ".", "test": "held/out"}))
    assert (len(found.train), len(found.test), found.class_names) == (20, 4, ("cat", "dog"))
    (classes / "held" / "out").rename(classes / "val")
    (classes / "held").rmdir()
    found = load_dataset(config.model_copy(update={"train": ".", "test_fraction": 0.25}))
    assert (len(found.train), len(found.test), len(found.validation or ())) == (15, 5, 4)
    caplog.clear()
    found = load_dataset(config.model_copy(update={"train": ".", "test_fraction": 0.25, "validation": ""}))
    assert (len(found.train), len(found.test), found.validation) == (15, 5, None)
    assert "4 .png outside ./, such as val/cat/0.png" in caplog.text


def test_a_path_may_name_a_split(classes: Path, make_config: MakeConfig) -> None:
    (classes / "a" / "a").mkdir(parents=True)
    for name in ("cat", "dog"):
        (classes / name).rename(classes / "a" / "a" / name)
    fields = {"image_size": 4, "train": "a/a", "test": "holdout"}
    found = load_dataset(make_config(name="image_folder", root=str(classes), **fields))
    assert (len(found.train), len(found.test)) == (20, 4)


def test_an_unlabelled_validation_split_is_left_out_unless_it_is_named(
    tmp_path: Path, make_config: MakeConfig, write: Write
) -> None:
    load = write(train=8, test=4)
    root = tmp_path / "root"
    if (root / "train" / "cat").is_dir():
        (root / "val" / "unknown").mkdir(parents=True)
        (root / "val" / "unknown" / "0.png").write_bytes(encoded(np.zeros((8, 8), np.uint8)))
        error = "has no folder of this name under train/"
    else:
        hub(root, [encoded(np.zeros((8, 8), np.uint8))], val={"row": [1, 2]})
        error = "has no labels"
    if not (tmp_path / "root.zip").exists():
        assert contents(load()).keys() == {"train", "test"}
        with pytest.raises(UnavailableError, match=error):
            load(validation="val")


@pytest.mark.parametrize("name", ["digits", "tiny_imagenet", "mnist", "cifar10"])
@pytest.mark.parametrize("field", ["train", "validation", "test", "test_fraction"])
def test_other_sets_have_splits_of_their_own(make_config: MakeConfig, tmp_path: Path, name: str, field: str) -> None:
    config = make_config(name=name, root=str(tmp_path), **{field: 0.2 if field == "test_fraction" else "x"})
    with pytest.raises(ConfigError, match=rf"data\.{field}=(x|0\.2): .*; leave it out, or set data\.name="):
        load_dataset(config)


def test_a_class_too_small_to_hold_out(classes: Path, make_config: MakeConfig) -> None:
    fields = {"image_size": 4, "train": ".", "test": "holdout", "test_fraction": None}
    for number in range(1, 10):
        (classes / "dog" / f"{number}.png").unlink()
    config = make_config(name="image_folder", root=str(classes), **fields)
    split = config.model_copy(update={"test": None, "test_fraction": 0.2})
    with pytest.raises(ConfigError, match=r"data\.test_fraction=0\.2: class 'dog' has a single .* to split off test"):
        load_dataset(split)
