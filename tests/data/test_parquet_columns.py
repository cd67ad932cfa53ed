"""Which columns hold images and labels: by name, and never guessed from integers."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tla_service.data.parquet_columns import (
    IMAGE_NAMES,
    LABEL_NAMES,
    class_names,
    find_image_column,
    find_label_columns,
    no_label_column,
)
from tla_service.errors import ConfigError, UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = [pa.binary(), pa.large_binary(), pa.binary_view(), STRUCT]
LABELS = [pa.int64(), pa.uint8(), pa.string(), pa.large_string(), pa.bool_(), pa.dictionary(pa.int8(), pa.string())]
OTHERS = [pa.float64(), pa.list_(pa.int64()), pa.struct([("x", pa.int8())]), pa.timestamp("s"), pa.null()]
FIELDS = st.dictionaries(
    st.sampled_from(["image", "img", "Label", "labels", "fine_label", "id", "fold", "a", "b"]),
    st.sampled_from(IMAGES + LABELS + OTHERS),
)


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
