"""Parquet files as hubs publish them: real CIFAR-10, small ones, damaged ones."""

import json
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet as pq

from tests.data.conftest import hub
from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.data.sources import FileSource
from tla_service.errors import ConfigError, UnavailableError, UserError

MakeConfig = Callable[..., DataConfig]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, blobs: list[Any], labels: list[Any], *, plain: bool = False, metadata: Any = None) -> None:
    structs = [{"bytes": blob, "path": None} for blob in blobs]
    images = pa.array(blobs, pa.binary()) if plain else pa.array(structs, STRUCT)
    table = pa.table({"row": pa.array(["x"] * len(labels)), "image": images, "label": pa.array(labels, pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=3)


@pytest.fixture
def blobs(encoded: Callable[..., bytes]) -> list[bytes]:
    kinds = [("PNG", {}), ("WEBP", {"lossless": True})]
    pixels = [np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8) for number in range(10)]
    return [encoded(item, kinds[number % 2][0], **kinds[number % 2][1]) for number, item in enumerate(pixels)]


@pytest.fixture
def folder(tmp_path: Path, blobs: list[bytes]) -> Path:
    root = tmp_path / "hub"
    write(root / "train-00000-of-00002.parquet", blobs[:4], [0, 1, 2, 0])
    write(root / "train-00001-of-00002.parquet", blobs[4:8], [1, 2, 0, 1])
    write(root / "test-00000-of-00001.parquet", blobs[8:], [2, 1])
    return root


@pytest.mark.slow
def test_real_cifar10_is_decoded_once(real_data: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    # One of five shards: all of them take half a minute on a busy machine.
    for name in ("train-00003-of-00005.parquet", "test-00000-of-00001.parquet"):
        (tmp_path / name).symlink_to(real_data / "cifar10" / name)
    config = make_config(name="parquet", root=str(tmp_path))
    cifar = load_dataset(config)
    start = time.monotonic()
    again = load_dataset(config)
    warm_seconds = time.monotonic() - start
    by_name = load_dataset(config.model_copy(update={"name": "cifar10"}))
    streamed = load_dataset(config.model_copy(update={"residency": "stream"}))

    assert warm_seconds < 1
    assert (len(cifar.train), len(cifar.test), cifar.image_shape) == (10_000, 10_000, (3, 32, 32))
    assert set(cifar.test.labels.bincount().tolist()) == {1000}
    assert cifar.class_names[:3] == ("airplane", "automobile", "bird")
    # The channel means of the test set, known from the original.
    means = cifar.test.fetch(torch.arange(10_000)).double().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.4942, 0.4851, 0.4504], dtype=torch.float64), atol=2e-4)
    assert cifar.fingerprint == again.fingerprint == by_name.fingerprint
    rows = torch.arange(0, 10_000, 99)
    assert isinstance(streamed.train, FileSource)
    assert torch.equal(streamed.train.fetch(rows), cifar.train.fetch(rows))
    assert torch.equal(streamed.train.labels, cifar.train.labels)


def test_cifar10_as_hubs_publish_it(
    tmp_path: Path, encoded: Callable[..., bytes], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column `img` of lossless WebP, shards, class names in the metadata; decoded once, streamed alike."""
    draws, names = np.random.default_rng(0), [f"class {number}" for number in range(10)]
    pixels = draws.integers(0, 256, (110, 32, 32, 3), np.uint8)
    labels = [row % 10 for row in range(110)]
    for name, rows in (("train-00000-of-00002", range(50)), ("train-00001-of-00002", range(50, 100)),
                       ("test-00000-of-00001", range(100, 110))):  # fmt: skip
        images = [{"bytes": encoded(pixels[row], "WEBP", lossless=True), "path": None} for row in rows]
        own = pa.array([labels[row] for row in rows], pa.int64())
        table = pa.table({"img": pa.array(images, STRUCT), "label": own})
        pq.write_table(table.replace_schema_metadata({"label_names": ",".join(names)}), tmp_path / f"{name}.parquet")
    config = make_config(name="cifar10", root=str(tmp_path))
    cifar = load_dataset(config)
    by_format = load_dataset(config.model_copy(update={"name": "parquet"}))
    streamed = load_dataset(config.model_copy(update={"residency": "stream"}))
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **how: opened.append(file) or original(file, **how))
    again = load_dataset(config)

    assert (len(cifar.train), len(cifar.test), cifar.image_shape) == (100, 10, (3, 32, 32))
    assert list(cifar.class_names) == names
    assert cifar.train.labels.tolist() == labels[:100]
    assert cifar.fingerprint == by_format.fingerprint == again.fingerprint
    assert np.array_equal(again.train.fetch(torch.arange(100)).numpy(), pixels[:100].transpose(0, 3, 1, 2))
    assert len(opened) <= 64  # those that are looked at for their shape
    assert isinstance(streamed.train, FileSource)
    assert np.array_equal(streamed.train.fetch(torch.arange(100)).numpy(), pixels[:100].transpose(0, 3, 1, 2))


def test_files_and_rows_keep_their_order(folder: Path, make_config: MakeConfig) -> None:
    found = load_dataset(make_config(name="parquet", root=str(folder)))
    assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert found.test.labels.tolist() == [2, 1]
    assert found.class_names == ("0", "1", "2")
    pixels = [np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8) for number in range(8)]
    assert np.array_equal(found.train.fetch(torch.arange(8)).numpy(), np.stack(pixels).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("residency", ["auto", "stream"])
def test_other_layouts_of_the_same_images(
    tmp_path: Path, blobs: list[bytes], make_config: MakeConfig, residency: str
) -> None:
    root = tmp_path / "other"
    write(root / "data" / "train.parquet", blobs[:8], [0, 1, 2, 0, 1, 2, 0, 1], plain=True)
    write(root / "data" / "validation-0.parquet", blobs[8:], [2, 1], plain=True)
    found = load_dataset(make_config(name="parquet", root=str(root), residency=residency, image_size=4))
    assert found.image_shape == (3, 4, 4)
    assert found.train.fetch(torch.tensor([7, 0])).shape == (2, 3, 4, 4)
    assert found.test.labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"label_names": "a, b,c"}, ("a", "b", "c")),
        ({"huggingface": json.dumps({"info": {"features": {"label": {"names": ["x", "y", "z"]}}}})}, ("x", "y", "z")),
        ({"huggingface": "{"}, ("0", "1", "2")),
        ({"huggingface": "[]", "label_names": b"\xff,b,c"}, ("\ufffd", "b", "c")),
    ],
)
def test_class_names_from_the_metadata(
    folder: Path, blobs: list[bytes], make_config: MakeConfig, metadata: Any, names: tuple[str, ...]
) -> None:
    write(folder / "train-00000-of-00002.parquet", blobs[:4], [0, 1, 2, 0], metadata=metadata)
    assert load_dataset(make_config(name="parquet", root=str(folder))).class_names == names


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_rubbish_files_are_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.getbasetemp() / "rubbish"
    root.mkdir(exist_ok=True)
    write(root / "test-0.parquet", [b"abc"] * 4, [0, 1, 0, 1])
    whole = (root / "test-0.parquet").read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    (root / "train-0.parquet").write_bytes(whole[:start] + data.draw(st.binary(max_size=50)))
    config = DataConfig(name="parquet", root=str(root), cache_dir=str(root / "cache"))
    with pytest.raises(UserError, match=r"data\.root=.*train-0\.parquet"):
        load_dataset(config)


@pytest.mark.parametrize(
    ("blob", "label", "message"),
    [
        (None, 1, r"row 1: no image bytes"),
        (b"rubbish", 1, r"row 1: not a readable image"),
        (b"", None, r"row 1: has no label \(None\)"),
        (b"", -1, r"row 1: has no label \(-1\)"),
    ],
)
def test_bad_rows_are_named(
    folder: Path, blobs: list[bytes], make_config: MakeConfig, blob: bytes | None, label: int | None, message: str
) -> None:
    write(folder / "train-00001-of-00002.parquet", [blobs[0], blobs[1] if blob == b"" else blob], [0, label])
    with pytest.raises(UnavailableError, match=rf"data\.root=.*train-00001-of-00002\.parquet, {message}"):
        load_dataset(make_config(name="parquet", root=str(folder)))


def test_images_of_several_sizes_need_a_side(
    folder: Path, encoded: Callable[..., bytes], make_config: MakeConfig
) -> None:
    write(folder / "train-00001-of-00002.parquet", [encoded(np.zeros((9, 7, 3), np.uint8))] * 3, [0, 1, 2])
    with pytest.raises(ConfigError, match=r"data\.image_size: .*row 0 has 7x9 pixels, others 6x6"):
        load_dataset(make_config(name="parquet", root=str(folder)))
    assert load_dataset(make_config(name="parquet", root=str(folder), image_size=6)).image_shape == (3, 6, 6)


def test_a_file_without_rows_is_refused(folder: Path, make_config: MakeConfig) -> None:
    write(folder / "test-00000-of-00001.parquet", [], [])
    with pytest.raises(UnavailableError, match=r"test-00000-of-00001\.parquet: holds no rows"):
        load_dataset(make_config(name="parquet", root=str(folder)))


def test_files_that_differ_in_their_columns_are_refused(folder: Path, make_config: MakeConfig) -> None:
    pq.write_table(pa.table({"other": [1, 2]}), folder / "train-00001-of-00002.parquet")
    with pytest.raises(UnavailableError, match=r"train-00001-of-00002\.parquet"):
        load_dataset(make_config(name="parquet", root=str(folder)))


def test_other_integer_columns_are_no_labels(tmp_path: Path, blobs: list[bytes], make_config: MakeConfig) -> None:
    columns = {"fold": [0, 1, 2, 3] * 3, "width": [500] * 12, "label": ["dog", "cat"] * 6}
    root = hub(tmp_path / "text", blobs, train=columns, test=columns)
    found = load_dataset(make_config(name="parquet", root=root))
    assert found.class_names == ("cat", "dog")
    assert found.train.labels.tolist() == [1, 0] * 6

    columns = {"image_id": list(range(12)), "breed_id": [0, 1, 1] * 4}
    root = hub(tmp_path / "named", blobs, train=columns, test=columns)
    with pytest.raises(
        ConfigError, match=r"data\.label_column: .*image_id \(int64\), breed_id \(int64\); set"
    ) as caught:
        load_dataset(make_config(name="parquet", root=root))
    assert caught.value.exit_code == 2
    found = load_dataset(make_config(name="parquet", root=root, label_column="breed_id"))
    assert found.train.labels.tolist() == [0, 1, 1] * 4


def test_one_of_several_label_columns_is_said(
    tmp_path: Path, blobs: list[bytes], make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"target": [0, 1, 2, 3] * 3, "fine_label": [0, 1, 1] * 4}
    root = hub(tmp_path, blobs, train=columns, test=columns)
    assert load_dataset(make_config(name="parquet", root=root)).train.labels.tolist() == [0, 1, 1] * 4
    text = "labels are read from column 'fine_label', not from target; data.label_column chooses another"
    assert sum(message.endswith(text) for message in caplog.messages) == 2
    chosen = load_dataset(make_config(name="parquet", root=root, label_column="target"))
    assert chosen.train.labels.tolist() == [0, 1, 2, 3] * 3
    assert len(caplog.messages) == 2


def test_one_of_several_image_columns(tmp_path: Path, blobs: list[bytes], make_config: MakeConfig) -> None:
    columns = {"label": [0, 1] * 4, "mask": blobs[8:] * 4}
    root = hub(tmp_path / "named", blobs, train=columns, test=columns)
    plain = load_dataset(make_config(name="parquet", root=root))
    masks = load_dataset(make_config(name="parquet", root=root, image_column="mask"))
    assert torch.equal(masks.train.fetch(torch.arange(2)), masks.train.fetch(torch.arange(2, 4)))
    assert not torch.equal(masks.train.fetch(torch.arange(2)), plain.train.fetch(torch.arange(2)))


def test_what_a_killed_process_packed_is_removed(
    folder: Path, make_config: MakeConfig, fork: Callable[..., ForkProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tla_service.data.parquet._read_images", lambda *_: os._exit(9))
    config = make_config(name="parquet", root=str(folder))
    fork(load_dataset, config).join(60)
    parts = Path(config.cache_dir, "packed")
    assert len([*parts.glob(".*.part")]) == 1
    monkeypatch.undo()
    load_dataset(config)
    assert not [*parts.glob(".*.part")]


def test_an_empty_file_among_others_does_no_harm(folder: Path, blobs: list[bytes], make_config: MakeConfig) -> None:
    expected = load_dataset(make_config(name="parquet", root=str(folder)))
    write(folder / "train-00000-of-00001.parquet", [], [])
    assert load_dataset(make_config(name="parquet", root=str(folder))).fingerprint == expected.fingerprint


def test_the_fingerprint_is_that_of_earlier_versions(folder: Path, make_config: MakeConfig) -> None:
    # A run that was stopped before labels were checked by their values must resume.
    assert load_dataset(make_config(name="parquet", root=str(folder))).fingerprint == "230727e83385b502"


def test_a_cut_cache_is_made_again(folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(name="parquet", root=str(folder), residency="stream")
    before = load_dataset(config)
    for path in (tmp_path / "cache" / "packed").glob("*.blobs"):
        path.write_bytes(path.read_bytes()[:-1])
    after = load_dataset(config)
    assert after.fingerprint == before.fingerprint
    decoded = load_dataset(make_config(name="parquet", root=str(folder)))
    assert torch.equal(after.train.fetch(torch.arange(8)), decoded.train.fetch(torch.arange(8)))


def test_from_a_bucket(s3: Any, folder: Path, make_config: MakeConfig) -> None:
    for path in folder.glob("*.parquet"):
        s3.put(f"hub/{path.name}", path.read_bytes())
    remote = load_dataset(make_config(name="parquet", root="s3://images/hub"))
    assert remote.fingerprint == load_dataset(make_config(name="parquet", root=str(folder))).fingerprint
