"""Which Parquet files make up a data set, and which of its splits is tested on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.data.conftest import hub
from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.errors import ConfigError, UnavailableError

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def blobs(encoded: Callable[..., bytes]) -> list[bytes]:
    return [encoded(np.full((6, 6, 3), 20 * number, np.uint8)) for number in range(10)]


@pytest.mark.parametrize("places", [("digits", "letters"), ("data", "old/data"), (".", "old")])
def test_several_sets_in_one_root_are_refused(
    tmp_path: Path, blobs: list[bytes], make_config: MakeConfig, places: tuple[str, str]
) -> None:
    for place in places:
        hub(tmp_path / place, blobs, train={"label": [0, 1] * 4}, test={"label": [0, 1]})
    with pytest.raises(ConfigError, match=rf"data\.root=.*: holds 2 data sets: {places[0]}, {places[1]}; point it at"):
        load_dataset(make_config(name="parquet", root=str(tmp_path)))


def test_splits_in_folders_of_their_own_are_one_set(
    tmp_path: Path, blobs: list[bytes], make_config: MakeConfig
) -> None:
    hub(tmp_path / "train", blobs, train={"label": [0, 1] * 4})
    hub(tmp_path / "test", blobs, test={"label": [0, 1]})
    assert len(load_dataset(make_config(name="parquet", root=str(tmp_path))).train) == 8


NO_LABELS = {"minus": {"label": [-1] * 4}, "null": {"label": pa.nulls(4, pa.int64())}, "absent": {"row": [1] * 4}}
NO_LABELS |= {"typeless": {"label": pa.nulls(4)}, "not numbers": {"label": [float("nan")] * 4}}


@pytest.mark.parametrize("kind", NO_LABELS)
@pytest.mark.parametrize("spelling", ["validation", "valid", "val", "dev"])
def test_without_test_labels_the_validation_files_are_used(
    tmp_path: Path,
    blobs: list[bytes],
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    spelling: str,
) -> None:
    splits = {"train": {"label": [0, 1, 2] * 4}, "test": NO_LABELS[kind], spelling: {"label": [2, 1, 0]}}
    root = hub(tmp_path, blobs, **splits)
    found = load_dataset(make_config(name="parquet", root=root))
    assert found.test.labels.tolist() == [2, 1, 0]
    assert f"{root}/test-00000-of-00001.parquet has no labels; testing on the {spelling} files (" in caplog.text
    assert f"data.root={root}: files left out: test-00000-of-00001.parquet" in caplog.text


@pytest.mark.parametrize("kind", NO_LABELS)
def test_without_any_test_labels_the_remedy_says_what_is_missing(
    tmp_path: Path, blobs: list[bytes], make_config: MakeConfig, kind: str
) -> None:
    splits = {"train": {"label": [0, 1] * 4}, "test": NO_LABELS[kind]}
    root = hub(tmp_path, blobs, **splits)
    message = r"test-00000-of-00001\.parquet: has no labels; add labels in .*, or labelled validation-\*\.parquet files"
    with pytest.raises(UnavailableError, match=message):
        load_dataset(make_config(name="parquet", root=root))
    hub(tmp_path, blobs, validation=NO_LABELS[kind])
    with pytest.raises(UnavailableError, match=r"has no labels, and neither have the validation files; add"):
        load_dataset(make_config(name="parquet", root=root))


def test_files_that_are_not_used_and_shards_that_are_missing_are_said(
    tmp_path: Path, blobs: list[bytes], make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    root = hub(tmp_path, blobs, train={"label": [0, 1] * 3}, test={"label": [1, 0]}, validation={"label": [0, 1, 1]})
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    hub(tmp_path, blobs, Train={"label": [0, 1]})
    found = load_dataset(make_config(name="parquet", root=root))
    assert (len(found.train), len(found.test)) == (6, 2)
    assert f"{root}/train-00000-of-00002.parquet: only 1 of 2 files are there" in caplog.messages
    names = "Train-00000-of-00001.parquet, validation-00000-of-00001.parquet"
    left_out = f"data.root={root}: files left out: {names}"
    assert left_out in caplog.messages


def test_a_zip_file_is_refused_in_words(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "hub.zip").write_bytes(b"PK")
    with pytest.raises(UnavailableError, match=r"hub\.zip: is a file, not a folder of Parquet files; unpack it"):
        load_dataset(make_config(name="parquet", root=str(tmp_path / "hub.zip")))
