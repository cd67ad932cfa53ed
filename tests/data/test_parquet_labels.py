"""Labels of every type to class numbers, checked against loops over the rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from tla_service.data.parquet_files import open_shards
from tla_service.data.parquet_labels import Labels, number_classes, read_labels
from tla_service.errors import ConfigError, UnavailableError

Read = Callable[..., Labels]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes files of labels, one per array, and reads them back."""

    def make(name: str, *arrays: Any, names: Any = None) -> Labels:
        paths = [tmp_path / f"{name}-{place}.parquet" for place in range(len(arrays))]
        for place, (path, array) in enumerate(zip(paths, arrays, strict=True)):
            own = names[place] if names and isinstance(names[0], list) else names
            features = {"info": {"features": {"label": {"names": own}}}}
            metadata = {"huggingface": json.dumps(features)} if own else None
            pq.write_table(pa.table({"label": array}).replace_schema_metadata(metadata), path, row_group_size=3)
        return read_labels(open_shards(paths, tmp_path, "x"), "label")

    return make


KINDS: dict[str, tuple[Any, list[Any], tuple[str, ...]]] = {
    "integers": (pa.int32(), [0, 1, 2], ("0", "1", "2")),
    "from 1": (pa.int64(), [1, 2], ("1", "2")),
    "gaps": (pa.int64(), [0, 5, 9], ("0", "5", "9")),
    "WordNet": (pa.int64(), [2_084_071, 2_121_808], ("2084071", "2121808")),
    "hashes": (pa.uint64(), [17, 2**64 - 1], ("17", str(2**64 - 1))),
    "text": (pa.string(), ["dog", "cat", "eel"], ("cat", "dog", "eel")),
    "large text": (pa.large_string(), ["b", "a"], ("a", "b")),
    "digits as text": (pa.string(), ["10", "9"], ("10", "9")),
    "booleans": (pa.bool_(), [True, False], ("False", "True")),
    "dictionary of text": (pa.dictionary(pa.int8(), pa.string()), ["dog", "cat"], ("cat", "dog")),
    "dictionary of integers": (pa.dictionary(pa.int8(), pa.int64()), [7, 3], ("3", "7")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_labels(read: Read, kind: str) -> None:
    arrow, values, names = KINDS[kind]
    rows = [values[place % len(values)] for place in range(12)]
    train = read("train", pa.array(rows[:5], arrow), pa.array([], arrow), pa.array(rows[5:], arrow))
    test = read("test", pa.array(rows[:2], arrow))
    found, (train_classes, test_classes) = number_classes(train, test)
    assert found == names
    assert [found[number] for number in train_classes] == [str(value) for value in rows]
    assert [found[number] for number in test_classes] == [str(value) for value in rows[:2]]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_class_numbers_of_any_labels(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    home = tmp_path_factory.mktemp("labels")
    values = data.draw(st.lists(st.integers(0, 2**62) | st.integers(0, 4), min_size=2, max_size=5, unique=True))
    rows = data.draw(st.permutations(values * 3))
    cut = data.draw(st.integers(0, len(rows)))
    chosen = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=6))
    for name, part in (("train-0", rows[:cut]), ("train-1", rows[cut:]), ("test-0", chosen)):
        pq.write_table(pa.table({"label": pa.array(part, pa.int64())}), home / f"{name}.parquet", row_group_size=2)

    def labels(*names: str) -> Labels:
        return read_labels(open_shards([home / f"{name}.parquet" for name in names], home, "x"), "label")

    names, (train, test) = number_classes(labels("train-0", "train-1"), labels("test-0"))
    assert names == tuple(str(value) for value in sorted(values))
    assert [names[number] for number in train] == [str(value) for value in rows]
    assert [names[number] for number in test] == [str(value) for value in chosen]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_files_with_names_in_any_order_are_matched_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    home = tmp_path_factory.mktemp("names")
    names = ["cat", "dog", "eel", "fox"]
    orders = [data.draw(st.permutations(names)) for _ in range(3)]
    rows = [data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=8)) for _ in range(3)]
    paths = [home / f"{name}.parquet" for name in ("train-0", "train-1", "test-0")]
    for path, order, chosen in zip(paths, orders, rows, strict=True):
        features = {"info": {"features": {"label": {"names": order}}}}
        table = pa.table({"label": [order.index(name) for name in chosen]})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    train = read_labels(open_shards(paths[:2], home, "x"), "label")
    test = read_labels(open_shards(paths[2:], home, "x"), "label")
    found, (train_classes, test_classes) = number_classes(train, test)
    assert list(found) == orders[0]
    assert [found[number] for number in train_classes] == rows[0] + rows[1]
    assert [found[number] for number in test_classes] == rows[2]


def test_a_test_set_with_some_of_the_names_is_matched(read: Read) -> None:
    train = read("train", pa.array([0, 1, 2] * 2), names=["cat", "dog", "eel"])
    test = read("test", pa.array([0, 1]), names=["eel", "cat"])
    assert number_classes(train, test)[1][1].tolist() == [2, 0]
    # A name that no row uses does no harm.
    test = read("other", pa.array([1]), names=["wolf", "cat"])
    assert number_classes(train, test)[1][1].tolist() == [0]


def test_names_beyond_those_of_training_are_refused(read: Read) -> None:
    train = read("train", pa.array([0, 1] * 3), names=["cat", "dog"])
    with pytest.raises(UnavailableError, match=r"test-0\.parquet, row 1: class 'wolf' is not among the classes of the"):
        number_classes(train, read("test", pa.array([0, 1]), names=["dog", "wolf"]))
    with pytest.raises(UnavailableError, match=r"test-0\.parquet, row 2: label 2, but only 2 class names"):
        number_classes(train, read("test", pa.array([0, 1, 2])))
    plain = read("plain", pa.array([0, 1] * 3))
    with pytest.raises(UnavailableError, match=r"test-0\.parquet, row 2: class 2 is not among the classes of the"):
        number_classes(plain, read("test", pa.array([0, 1, 2])))


@pytest.mark.parametrize("names", [None, ["cat", "dog", "eel"]])
def test_labels_that_start_at_1_are_said(read: Read, caplog: pytest.LogCaptureFixture, names: Any) -> None:
    train, test = read("train", pa.array([1, 2, 3] * 2), names=names), read("test", pa.array([3, 1]), names=names)
    found, (classes, test_classes) = number_classes(train, test)
    assert found == (("cat", "dog", "eel") if names else ("1", "2", "3"))
    assert classes.tolist() == [0, 1, 2] * 2
    assert test_classes.tolist() == [2, 0]
    assert len(caplog.messages) == 1
    assert "labels start at 1" in caplog.messages[0]


def test_numbers_that_are_ids_are_said(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    number_classes(read("train", pa.array([17, 2_100_000_000] * 2)), read("test", pa.array([17])))
    (said,) = caplog.messages
    assert said.endswith("labels are 2 numbers from 17 to 2100000000; each is a class")


def test_labels_of_the_usual_kind_are_not_remarked_on(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    number_classes(read("train", pa.array([0, 1] * 2)), read("test", pa.array([1])))
    number_classes(read("names", pa.array([1, 0, 2] * 2), names=["a", "b", "c"]), read("test", pa.array([1])))
    assert caplog.messages == []


@pytest.mark.parametrize(
    "array", [pa.array([5, 3, 2, 9, 1]), pa.array(["e", "b", "c", "d", "a"]), pa.array([0, 1, 2, 3, 4])]
)
def test_a_column_that_tells_images_apart_is_refused(read: Read, array: pa.Array) -> None:
    with pytest.raises(ConfigError, match=r"^data\.label_column=label: has 5 distinct values in 5 rows") as caught:
        number_classes(read("train", array), read("test", array))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array([0, 1, None, 1]), r"row 2: has no label \(None\)"),
        (pa.array([0, 1, 1, -1]), r"row 3: has no label \(-1\)"),
        (pa.array([0, -100, 1, 1]), r"row 1: has no label \(-100\)"),
        (pa.array(["a", "", "a", "b"]), r"row 1: has no label \(''\)"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_rows_without_a_label_are_named(read: Read, array: pa.Array, message: str, part: str) -> None:
    whole = read("whole", pa.array([0, 1] * 2) if pa.types.is_integer(array.type) else pa.array(["a", "b"] * 2))
    bad = read(part, array[:0], array)
    with pytest.raises(UnavailableError, match=rf"{part}-1\.parquet, {message}"):
        number_classes(*((whole, bad) if part == "test" else (bad, whole)))


@pytest.mark.parametrize("values", [[-1, -1], [None, None], [-1, None]])
def test_a_split_without_any_label_is_known(read: Read, values: list[int | None]) -> None:
    assert read("test", pa.array(values, pa.int64())).all_missing
    assert not read("some", pa.array([*values, 0], pa.int64())).all_missing


def test_labels_of_different_types_are_refused(read: Read) -> None:
    numbers, text = pa.array([0, 1] * 2), pa.array(["a", "b"] * 2)
    with pytest.raises(
        UnavailableError, match=r"test-0\.parquet: labels are text, those of the training files integers"
    ):
        number_classes(read("train", numbers), read("test", text))
    with pytest.raises(UnavailableError, match=r"train-1\.parquet: has no column 'label' of integers, unlike train-0"):
        read("train", numbers, text)


def test_nothing_of_the_size_of_the_largest_label_is_made(read: Read) -> None:
    train, test = read("train", pa.array([0, 2**62] * 3)), read("test", pa.array([2**62]))
    names, (classes, _) = number_classes(train, test)
    assert names == ("0", str(2**62))
    assert classes.tolist() == [0, 1] * 3
