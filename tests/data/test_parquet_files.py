"""Parquet files of a data set: which of its splits is tested on, and which columns hold images and labels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.data.conftest import hub
from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.data.parquet_files import (
    IMAGE_NAMES,
    LABEL_NAMES,
    class_names,
    find_image_column,
    find_label_columns,
    no_label_column,
    read_column,
)
from tla_service.errors import ConfigError, UnavailableError, UserError

MakeConfig = Callable[..., DataConfig]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = [pa.binary(), pa.large_binary(), pa.binary_view(), STRUCT]
LABELS = [pa.int64(), pa.uint8(), pa.string(), pa.large_string(), pa.bool_(), pa.dictionary(pa.int8(), pa.string())]
OTHERS = [pa.float64(), pa.list_(pa.int64()), pa.struct([("x", pa.int8())]), pa.timestamp("s"), pa.null()]
FIELDS = st.dictionaries(
    st.sampled_from(["image", "img", "Label", "labels", "fine_label", "id", "fold", "a", "b"]),
    st.sampled_from(IMAGES + LABELS + OTHERS),
)


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
    assert f"{root}/test-00000-of-00001.parquet has no labels; testing on the {spelling} files\n" in caplog.text
    assert f"data.root={root}: files left out: test-00000-of-00001.parquet" in caplog.text


@pytest.mark.parametrize("kind", NO_LABELS)
def test_without_any_test_labels_the_remedy_says_what_is_missing(
    tmp_path: Path, blobs: list[bytes], make_config: MakeConfig, kind: str
) -> None:
    splits = {"train": {"label": [0, 1] * 4}, "test": NO_LABELS[kind]}
    root = hub(tmp_path, blobs, **splits)
    message = (
        r"test-00000-of-00001\.parquet: has no labels; add labels in .*, or labelled validation-\*.* files, or hold"
    )
    with pytest.raises(UnavailableError, match=message):
        load_dataset(make_config(name="parquet", root=root))
    hub(tmp_path, blobs, validation=NO_LABELS[kind])
    with pytest.raises(UnavailableError, match=r"has no labels, and neither have the validation files; add"):
        load_dataset(make_config(name="parquet", root=root))


def test_files_that_are_not_used_and_shards_that_are_missing_are_said(
    tmp_path: Path, blobs: list[bytes], make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    root = hub(tmp_path, blobs, train={"label": [0, 1] * 3}, test={"label": [1, 0]}, extra={"label": [0, 1, 1]})
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    hub(tmp_path, blobs, Train={"label": [0, 1]})
    found = load_dataset(make_config(name="parquet", root=root))
    assert (len(found.train), len(found.test)) == (6, 2)
    assert f"{root}/train-00000-of-00002.parquet: only 1 of 2 files are there" in caplog.messages
    names = "Train-00000-of-00001.parquet, extra-00000-of-00001.parquet"
    left_out = f"data.root={root}: files left out: {names}"
    assert left_out in caplog.messages


def test_a_zip_file_is_refused_in_words(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "hub.zip").write_bytes(b"PK")
    with pytest.raises(UnavailableError, match=r"hub\.zip: is a file, not a folder of Parquet files; unpack it"):
        load_dataset(make_config(name="parquet", root=str(tmp_path / "hub.zip")))


@settings(deadline=None)
@given(FIELDS)
def test_labels_are_found_by_name_only(fields: dict[str, pa.DataType]) -> None:
    found = find_label_columns(pa.schema(list(fields.items())), None)
    usable = [name for name, kind in fields.items() if kind in LABELS and name.lower() in LABEL_NAMES]
    assert found == sorted(usable, key=lambda name: LABEL_NAMES.index(name.lower()))


@settings(deadline=None)
@given(FIELDS)
def test_images_are_found_by_type_and_by_name_among_several(fields: dict[str, pa.DataType]) -> None:
    images = [name for name, kind in fields.items() if kind in IMAGES]
    named = [name for name in IMAGE_NAMES if name in images]
    schema = pa.schema(list(fields.items()))
    if named or len(images) == 1:
        assert find_image_column(schema, "x.parquet", None) == (named or images)[0]
    else:
        with pytest.raises(UserError, match=r"x\.parquet has (no|several) column"):
            find_image_column(schema, "x.parquet", None)


@settings(deadline=None)
@given(FIELDS, st.sampled_from(["image", "fold", "id", "nowhere"]))
def test_a_column_that_is_named_is_the_one_or_refused(fields: dict[str, pa.DataType], name: str) -> None:
    schema = pa.schema(list(fields.items()))
    assert find_label_columns(schema, name) == ([name] if fields.get(name) in LABELS else [])
    if fields.get(name) in IMAGES:
        assert find_image_column(schema, "x", name) == name
    else:
        with pytest.raises(ConfigError, match=rf"data\.image_column={name}: is no column of image bytes in x; give"):
            find_image_column(schema, "x", name)


def test_refusals_list_the_columns() -> None:
    schema = pa.schema([("image", STRUCT), ("fold", pa.int64()), ("breed_id", pa.int64()), ("target", pa.float64())])
    columns = r"image \(struct\), fold \(int64\), breed_id \(int64\)"
    error = no_label_column(pa.schema([schema.field(place) for place in range(3)]), "x.parquet", None)
    assert error.exit_code == 2
    with pytest.raises(
        ConfigError, match=rf"^data\.label_column: x\.parquet has no column named .*, but {columns}; set"
    ):
        raise error
    with pytest.raises(ConfigError, match=rf"^data\.label_column=breed: is no column of x; give one of {columns}"):
        raise no_label_column(schema, "x", "breed")
    with pytest.raises(ConfigError, match=r"^data\.label_column=target: is double in x; labels are integers, text or"):
        raise no_label_column(schema, "x", None)
    with pytest.raises(ConfigError, match=r"^data\.image_column: x has several columns of image bytes.*: left, right;"):
        find_image_column(pa.schema([("left", STRUCT), ("right", pa.binary())]), "x", None)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([b"huggingface", b"label_names", b"x"]), st.binary(max_size=30)))
def test_rubbish_metadata_is_survived(metadata: dict[bytes, bytes]) -> None:
    names = class_names(pa.schema([("label", pa.int8())], metadata=metadata), "label")
    assert all(isinstance(name, str) for name in names)


def test_columns_of_one_name_are_refused(tmp_path: Path, blobs: list[bytes], make_config: MakeConfig) -> None:
    hub(tmp_path, blobs, train={"label": [0, 1] * 4}, test={"label": [0, 1]})
    labels = pa.array([0, 1])
    table = pa.Table.from_arrays([pa.array(blobs[:2]), labels, labels], names=["image", "label", "label"])
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(UnavailableError, match=r"test-.*: has several columns named 'label'; write the file again"):
        load_dataset(make_config(name="parquet", root=str(tmp_path)))


def test_a_wrong_number_of_rows_is_refused(tmp_path: Path, blobs: list[bytes]) -> None:
    path = Path(hub(tmp_path, blobs, train={"label": [0, 1] * 5})) / "train-00000-of-00001.parquet"
    blob = bytearray(path.read_bytes())
    blob[blob.index(bytes([0x16, 20]), len(blob) - 8 - int.from_bytes(blob[-8:-4], "little")) + 1] = 24  # 12, not 10
    path.write_bytes(blob)
    with pytest.raises(UnavailableError, match=r"not a readable Parquet file \("):
        list(read_column(path, "label", 100))
