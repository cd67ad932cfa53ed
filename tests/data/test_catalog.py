"""Data sets by name: limits, checks, fingerprints."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tla_service.config import DataConfig
from tla_service.data import catalog
from tla_service.data.sources import ArraySource, Dataset, Splits
from tla_service.errors import ConfigError, UnavailableError, UserError

MakeConfig = Callable[..., DataConfig]


def splits(train_labels: list[int], test_labels: list[int], names: tuple[str, ...] = ("a", "b")) -> Splits:
    def source(labels: list[int]) -> ArraySource:
        images = torch.arange(len(labels) * 4).reshape(-1, 1, 2, 2) % 256
        return ArraySource(images.to(torch.uint8), torch.tensor(labels, dtype=torch.int64))

    return Splits(names, source(train_labels), source(test_labels))


@pytest.fixture
def load_made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Dataset]:
    """Loads splits made on the spot as if they were the digits."""

    def load(made: Splits, **fields: Any) -> Dataset:
        monkeypatch.setitem(catalog._LOADERS, "digits", lambda _: made)
        return catalog.load_dataset(DataConfig(**fields))

    return load


def test_digits_come_with_the_installation(make_config: MakeConfig) -> None:
    digits = catalog.load_dataset(make_config())
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    assert digits.image_shape == digits.train.image_shape == (1, 8, 8)
    assert digits.class_names == tuple("0123456789")
    images = torch.cat([digits.train.fetch(torch.arange(1347)), digits.test.fetch(torch.arange(450))])
    assert images.dtype == torch.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 1797
    assert digits.test.labels.bincount().min() >= 43
    assert catalog.load_dataset(make_config()).fingerprint == digits.fingerprint
    assert catalog.load_dataset(make_config(image_size=32)).image_shape == (1, 32, 32)


def test_digits_values_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    originals = {
        (tuple((image * 255 / 16).round().astype(int).flatten().tolist()), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    test = catalog.load_dataset(DataConfig()).test
    found = zip(test.fetch(torch.arange(450)), test.labels, strict=True)
    assert {(tuple(image.flatten().tolist()), int(label)) for image, label in found} <= originals


def test_the_gates_images_are_the_same_under_every_limit() -> None:
    def gate(config: DataConfig) -> tuple[set[bytes], set[bytes]]:
        data = catalog.load_dataset(config)
        images = [image.numpy().tobytes() for image in data.test.fetch(torch.arange(len(data.test)))]
        sides = [
            {image for image, own in zip(images, data.gate.tolist(), strict=True) if own is side}
            for side in (True, False)
        ]
        return sides[0], sides[1]

    gates, others = gate(DataConfig())
    assert (len(gates), len(others)) == (110, 340)
    assert gate(DataConfig(train_limit=100)) == (gates, others)
    few, rest = gate(DataConfig(test_limit=90))
    assert len(few | rest) == 90
    assert few
    assert few <= gates
    assert rest <= others


def test_limits_cut_both_parts_and_change_the_fingerprint(make_config: MakeConfig) -> None:
    whole = catalog.load_dataset(make_config())
    cut = catalog.load_dataset(make_config(train_limit=100, test_limit=3))
    assert (len(cut.train), len(cut.test)) == (100, 3)
    assert set(cut.train.labels.bincount().tolist()) <= {9, 10, 11}
    assert cut.fingerprint != whole.fingerprint
    assert catalog.load_dataset(make_config(train_limit=100, test_limit=3)).fingerprint == cut.fingerprint
    assert catalog.load_dataset(make_config(train_limit=10_000)).fingerprint == whole.fingerprint


def test_a_limit_below_the_number_of_classes_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.train_limit=5: .*10 classes.*; use at least 40"):
        catalog.load_dataset(make_config(train_limit=5))


@pytest.mark.parametrize("counts", [[1000, 9], [3, 2000, 2000, 5], [500, 1], [40] * 9 + [7]])
def test_the_limit_that_is_told_is_enough(load_made: Callable[..., Dataset], counts: list[int]) -> None:
    made = splits(
        [label for label, count in enumerate(counts) for _ in range(count)], [0], (*"abcdefghij"[: len(counts)],)
    )
    with pytest.raises(ConfigError, match=r"; use at least \d+$") as caught:
        load_made(made, train_limit=len(counts))
    enough = int(caught.value.remedy.split()[-1])
    assert len(load_made(made, train_limit=enough).train) == enough


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (splits([0, 0], [0], ("a",)), ConfigError, r"data\.name=digits: has one class only"),
        (splits([0, 0, 0], [0]), ConfigError, r"data\.name=digits: 1 classes have no training images, 'b' first"),
        (splits([0, 1, 2], [0]), UnavailableError, "labels beyond its 2 classes"),
        (splits([0, 1], [2]), UnavailableError, "labels beyond its 2 classes"),
        (splits([0, 1], []), UnavailableError, "no test images"),
        (splits([], [0]), UnavailableError, "no training images"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    load_made: Callable[..., Dataset], made: Splits, error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_made(made)


@pytest.mark.parametrize("label", [-1, 2, 2**40])
@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_beyond_the_classes_are_refused_before_they_are_counted(
    load_made: Callable[..., Dataset], part: str, label: int
) -> None:
    made = splits([0, 1, label], [0]) if part == "train" else splits([0, 1], [0, label])
    with pytest.raises(UnavailableError, match="has labels beyond its 2 classes; correct the labels"):
        load_made(made)


def test_classes_without_test_images_are_said(
    load_made: Callable[..., Dataset], caplog: pytest.LogCaptureFixture
) -> None:
    load_made(splits([0, 1, 2], [1], ("a", "b", "c")))
    assert caplog.messages == ["data.root=None: 2 classes have no test images: a, c"]


def test_classes_that_look_alike_are_said(load_made: Callable[..., Dataset], caplog: pytest.LogCaptureFixture) -> None:
    load_made(splits([0, 1, 2, 3], [0, 1, 2, 3], ("A", "a", "Cat", "cat ")))
    assert caplog.messages == ["data.root=None: classes 'Cat' and 'cat ' differ only in case or spaces"]


@pytest.mark.parametrize("field", ["label_column", "image_column"])
@pytest.mark.parametrize("name", ["digits", "tiny_imagenet", "image_folder", "mnist", "cifar10"])
def test_columns_are_for_parquet_only(make_config: MakeConfig, tmp_path: Any, name: str, field: str) -> None:
    config = make_config(name=name, root=str(tmp_path), image_size=8, **{field: "x"})
    with pytest.raises(ConfigError, match=rf"data\.{field}=x: .*; leave it out"):
        catalog.load_dataset(config)


@pytest.mark.parametrize("name", ["digits", "tiny_imagenet", "image_folder", "parquet"])
def test_only_torchvisions_sets_are_downloaded(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    config = make_config(name=name, root=str(tmp_path / "new"), download=True)
    with pytest.raises(ConfigError, match=rf"^data\.download=True: data set {name} cannot be downloaded; leave it out"):
        catalog.load_dataset(config)
    assert not (tmp_path / "new").exists()


def test_a_root_beside_the_digits_is_said_not_to_be_read(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.load_dataset(make_config(root="/data/birds"))
    assert [message.partition(",")[0] for message in caplog.messages] == ["data.root=/data/birds: not read"]


def test_parts_of_different_shapes_are_refused(load_made: Callable[..., Dataset]) -> None:
    made = splits([0, 1], [0])
    other = ArraySource(torch.zeros(1, 1, 3, 3, dtype=torch.uint8), torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"data\.image_size: training images are \(1, 2, 2\)"):
        load_made(made._replace(test=other))


@settings(deadline=None, max_examples=25)
@given(place=st.integers(0, 23), part=st.sampled_from(["train", "test"]))
def test_any_pixel_label_name_or_order_changes_the_fingerprint(place: int, part: str) -> None:
    def fingerprint(made: Splits) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(catalog._LOADERS, "digits", lambda _: made)
            return catalog.load_dataset(DataConfig()).fingerprint

    made = splits([0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0])
    source = getattr(made, part)
    pixels = source.images.clone()
    pixels.view(-1)[place] ^= 1
    labels = source.labels.clone()
    labels[place % 6] ^= 1
    changed = [
        made._replace(**{part: ArraySource(pixels, source.labels)}),
        made._replace(**{part: ArraySource(source.images, labels)}),
        made._replace(**{part: ArraySource(source.images.flip(0), source.labels.flip(0))}),
        made._replace(class_names=("a", "c")),
    ]
    assert len({fingerprint(item) for item in [made, *changed]}) == 5
    assert fingerprint(splits([0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0])) == fingerprint(made)


def test_every_name_of_the_configuration_has_a_loader() -> None:
    from typing import get_args

    from tla_service.config.sections import DatasetName

    assert set(catalog._LOADERS) == set(get_args(DatasetName))


@pytest.mark.parametrize("name", [name for name in catalog._LOADERS if name != "digits"])
def test_a_set_that_is_not_embedded_needs_a_root(make_config: MakeConfig, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.root: {name} is not embedded"):
        catalog.load_dataset(make_config(name=name, image_size=8))


@pytest.mark.parametrize("name", [name for name in catalog._LOADERS if name != "digits"])
def test_an_empty_root_is_refused_in_words(make_config: MakeConfig, tmp_path: Any, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnavailableError, match=r"data\.root=") as caught:
        catalog.load_dataset(make_config(name=name, root=str(tmp_path / "empty"), image_size=8))
    assert caught.value.remedy


def test_datasets_are_frozen(load_made: Callable[..., Dataset]) -> None:
    dataset = load_made(splits([0, 1], [0]))
    assert replace(dataset, name="other").name == "other"
    with pytest.raises(AttributeError):
        dataset.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("balance", ["none", "class_weights", "sampling"])
def test_unbalanced_classes_are_said_unless_they_are_balanced(
    load_made: Callable[..., Dataset], caplog: pytest.LogCaptureFixture, balance: str
) -> None:
    for fewest, unbalanced in ((1, True), (4, True), (5, False)):
        caplog.clear()
        load_made(splits([0] * 16 + [1] * fewest, [0, 1]), balance=balance)
        expected = f"the largest class, 'a' with 16 images, is {16 / fewest:.0f} times the smallest, 'b' with {fewest}"
        said = [text for text in caplog.messages if f"{expected}; consider data.balance" in text]
        assert len(said) == (unbalanced and balance == "none")
