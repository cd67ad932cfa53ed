"""Extra images: read, matched with the classes of the data set, checked for leaks, and mixed into batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.conftest import encoded, hub
from tla_service.config import DataConfig, RunConfig
from tla_service.data import Dataset, load_dataset, split_training
from tla_service.data import extra as module
from tla_service.data.batches import TrainingBatches
from tla_service.data.extra import ExtraImages, load_extra
from tla_service.data.sources import ArraySource, FileSource, ImageSource, JoinedSource
from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.runtime import WorkerContext
from tla_service.training.precheck import training_batches

MakeConfig = Callable[..., DataConfig]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
LABELS = np.arange(40) % 10


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig())


def held_out(dataset: Dataset) -> tuple[ImageSource, torch.Tensor]:
    return split_training(dataset, 0.1, 0)[1]


@pytest.fixture
def load(tmp_path: Path, digits: Dataset, make_config: MakeConfig) -> Callable[..., ExtraImages]:
    """Loads a file, or images (N, 8, 8) with labels."""

    def call(images: Any = NOISE, labels: Any = LABELS, **fields: Any) -> ExtraImages:
        path = images
        if isinstance(images, np.ndarray):
            path = tmp_path / "extra.npz"
            np.savez(path, image=images, label=labels)
        extra = {"path": str(path), "share": 0.5, "duplicates": fields.pop("duplicates", "refuse")}
        dataset = load_dataset(DataConfig(**fields)) if fields else digits
        found = load_extra(make_config(extra=extra, **fields), dataset, held_out(dataset))
        assert found is not None
        return found

    return call


def as_parquet(folder: Path, **columns: Any) -> Path:
    half = len(LABELS) // 2
    parts = {
        name: {column: values[rows] for column, values in columns.items()}
        for name, rows in (("a", slice(0, half)), ("b", slice(half, None)))
    }
    for name, rows in (("a", slice(0, half)), ("b", slice(half, None))):
        hub(folder, [encoded(image) for image in NOISE[rows]], **{name: parts[name] or {"row": [*range(half)]}})
    return folder


def test_npz_and_parquet_files_hold_the_same(load: Any, tmp_path: Path) -> None:
    folder = as_parquet(tmp_path / "numbers", label=LABELS.tolist())
    by_name = as_parquet(tmp_path / "names", label=[str(label) for label in LABELS])
    npz, *others = load(), load(folder), load(by_name), load(folder, residency="stream")
    assert isinstance(others[2].source, FileSource)
    for found in (npz, *others):
        assert found.rows.tolist() == [*range(40)]
        assert found.source.labels.tolist() == LABELS.tolist()
        assert (found.source.fetch(found.rows)[:, 0].numpy() == NOISE).all()
        assert found.facts["extra_images"] == "40"
    one_file = load(folder / "a-00000-of-00001.parquet")
    assert (one_file.source.fetch(one_file.rows)[:, 0].numpy() == NOISE[:20]).all()


def test_the_fingerprint_is_that_of_pixels_labels_and_what_is_left_out(load: Any, digits: Dataset) -> None:
    changed = NOISE.copy()
    changed[3, 2, 1] ^= 1
    leaking = np.concatenate([NOISE, digits.test.fetch(torch.tensor([5]))[:, 0].numpy()])
    found = [
        load(*arguments, duplicates="drop").facts["extra_fingerprint"]
        for arguments in ((NOISE, LABELS), (NOISE, LABELS), (changed, LABELS), (NOISE, LABELS[::-1]))
    ]
    found.append(load(leaking, np.append(LABELS, 0), duplicates="drop").facts["extra_fingerprint"])
    assert found[0] == found[1]
    assert len({*found}) == 4


def test_leaks_are_refused_by_name_or_dropped(load: Any, digits: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    """Also those of test images that data.test_limit leaves out."""
    validation = held_out(digits)[1]
    leaks = [digits.test.fetch(torch.tensor([5, 449])), digits.train.fetch(validation[7:8]).flip(3) // 2]
    images = np.concatenate([NOISE, torch.cat(leaks)[:, 0].numpy()])
    labels = np.append(LABELS, [0, 1, 2])
    for fields in ({}, {"test_limit": 10}):
        with pytest.raises(ConfigError) as caught:
            load(images, labels, **fields)
        text = str(caught.value)
        assert "/extra.npz: 3 of its 43 images are near-duplicates of validation or test images: " in text
        assert "row 40 = test image 5 (distance 0.00" in text
        assert "row 41 = test image 449 (distance 0.00" in text
        assert f"row 42 = held-out training image {validation[7]} (distance 0." in text
        assert "\n" not in text
    dropped = load(images, labels, duplicates="drop")
    assert dropped.rows.tolist() == [*range(40)]
    assert (dropped.facts["extra_images"], dropped.facts["extra_duplicates_left_out"]) == ("40", "3")
    assert "left out, since 3 of its 43 images are near-duplicates" in caplog.text
    with pytest.raises(ConfigError, match=r"3 of its 3 images are near-duplicates .*; leave them out$"):
        load(images[40:], labels[40:], duplicates="drop")


def test_a_node_compares_them_once(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    monkeypatch.setattr(module, "near_duplicates", lambda *_: pytest.fail("compares again"))
    load()


def test_a_files_name_may_be_in_capitals(load: Any, tmp_path: Path) -> None:
    load()
    (tmp_path / "extra.npz").rename(tmp_path / "EXTRA.NPZ")
    assert len(load(tmp_path / "EXTRA.NPZ").rows) == len(NOISE)


def test_a_file_in_a_bucket(load: Any, s3: Any, tmp_path: Path) -> None:
    load()
    s3.put("synthetic/extra.npz", (tmp_path / "extra.npz").read_bytes())
    found = load(f"s3://{s3.bucket}/synthetic/extra.npz")
    assert (found.source.fetch(found.rows)[:, 0].numpy() == NOISE).all()
    with pytest.raises(UnavailableError, match=r"data\.extra\.path=s3://images/other\.npz: no objects there"):
        load(f"s3://{s3.bucket}/other.npz")


def test_none_are_loaded_unless_asked_for(digits: Dataset) -> None:
    assert load_extra(DataConfig(), digits, held_out(digits)) is None


REFUSED: dict[str, tuple[Callable[[Path], Any], type[UserError], str]] = {
    "unlabeled": (lambda _: (NOISE, LABELS - 1), ConfigError, "row 0 has label -1, not one of 10 classes from 0"),
    "other classes": (lambda _: (NOISE, LABELS + 1), ConfigError, "row 9 has label 10, not one of 10 classes"),
    "other sizes": (lambda _: (NOISE[:, :7], LABELS), ConfigError, "images are (40, 7, 8), uint8"),
    "nowhere": (lambda path: [path / "x.npz"], UnavailableError, "x.npz: no such file or folder"),
    "nothing": (lambda path: [path], UnavailableError, "holds no .parquet files; give their folder, or one npz"),
    "text": (lambda path: [as_parquet(path, label=["cat"] * 40)], ConfigError, "row 0 has label 10, not one of 10"),
    "no labels": (lambda path: [as_parquet(path)], ConfigError, "has no column named label"),
    "null": (lambda path: [as_parquet(path, label=[None, *LABELS.tolist()[1:]])], UnavailableError, "has no label"),
}


@pytest.mark.parametrize(("make", "kind", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(load: Any, tmp_path: Path, make: Any, kind: type[UserError], words: str) -> None:
    with pytest.raises(kind) as caught:
        load(*make(tmp_path))
    assert str(caught.value).startswith("data.extra.path=")
    assert words in str(caught.value)


@pytest.mark.parametrize("labels", [[*range(10)], [*range(1, 10)] * 2])
def test_a_few_images_of_each_class_are_enough(
    load: Any, tmp_path: Path, labels: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    folder = hub(tmp_path / "hub", [encoded(image) for image in NOISE], few={"label": labels})
    assert load(folder).source.labels.tolist() == labels
    assert not caplog.messages


def test_parquet_images_of_another_size_are_refused(load: Any, tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", [encoded(NOISE[0][:7])], train={"label": [0, 1] * 5})
    with pytest.raises(ConfigError, match=r"its images are \(1, 7, 8\), those of the data set \(1, 8, 8\)"):
        load(folder)


def batches(dataset: Dataset, found: ExtraImages, rank: int = 0, world: int = 1, **data: Any) -> TrainingBatches:
    """Of 48 images, 12 training and 36 extra ones, from 50 training images."""
    data |= {"extra": {"path": "x", "share": 0.75}}
    config = RunConfig.model_validate({"data": data, "method": "at", "training": {"global_batch_size": 48}})
    return training_batches(config, dataset.train, torch.arange(50), WorkerContext(rank, world), found)


@pytest.mark.parametrize("balance", ["none", "sampling"])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_have_the_right_images_and_labels(load: Any, digits: Dataset, world: int, balance: str) -> None:
    """Counted out by hand: 5 steps of 10 training and 36 extra images, each of which is used 4 or 5 times."""
    found = load()
    sources = {"train": (digits.train, torch.arange(50)), "extra": (found.source, found.rows)}
    known = {
        source.fetch(rows[place : place + 1]).numpy().tobytes(): (part, place, int(source.labels[rows[place]]))
        for part, (source, rows) in sources.items()
        for place in range(len(rows))
    }
    used: list[tuple[str, int, int]] = []
    steps = zip(*(batches(digits, found, rank, world, balance=balance).epoch(0) for rank in range(world)), strict=True)
    for step in steps:
        here = []
        for part in step:
            assert part.global_size == 46
            assert part.anchors.images.shape[1:] == (1, 8, 8)
            pixels = (part.anchors.images * 255).round().byte()
            here += [known[image[None].numpy().tobytes()] for image in pixels]
            assert [label for *_, label in here[-len(pixels) :]] == part.anchors.labels.tolist()
        assert sum(part == "extra" for part, *_ in here) == 36
        used += here
    training = [place for part, place, _ in used if part == "train"]
    extra = [place for part, place, _ in used if part == "extra"]
    assert (sorted(training) == [*range(50)]) == (balance == "none")
    assert len(training) == 50
    assert sorted({extra.count(place) for place in range(40)}) == [4, 5]


def test_streamed_and_resident_batches_are_the_same(load: Any, digits: Dataset, tmp_path: Path) -> None:
    streamed = load(as_parquet(tmp_path / "hub", label=LABELS.tolist()), residency="stream")
    options = {"crop_padding": 1, "flip": True}
    resident = [*batches(digits, load(), residency="device", **options).epoch(1)]
    for workers in (0, 1):
        made = batches(digits, streamed, residency="stream", loader_workers=workers, **options)
        for one, two in zip(resident, made.epoch(1), strict=True):
            assert torch.equal(one.anchors.images, two.anchors.images)
            assert torch.equal(one.anchors.labels, two.anchors.labels)
        made.close()


def test_joined_sources_give_images_in_the_order_asked_for(load: Any, digits: Dataset) -> None:
    assert isinstance(digits.train, ArraySource)
    joined = JoinedSource(digits.train, load().source)
    rows = torch.tensor([1350, 3, 1347, 3, 0, 1386])
    expected = [digits.train.images[row] if row < 1347 else torch.from_numpy(NOISE[row - 1347])[None] for row in rows]
    assert torch.equal(joined.fetch(rows), torch.stack(expected))
    assert joined.fetch(rows[:0]).shape == (0, 1, 8, 8)
    assert joined.labels[rows].tolist()[2] == LABELS[0]
