"""What belongs to a data set: the same for folders, zip files, buckets and parquet."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq
from torch import distributed

from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.data.trees import is_member, notice, notice_left_out, refuse_several
from tla_service.errors import ConfigError

MakeConfig = Callable[..., DataConfig]
DROPPINGS = {
    "train/.ipynb_checkpoints/0-checkpoint.png": "image",
    "train/cat/.cache/1.png": "image",
    "train/cat/._0.png": b"\0\5\x16\7\0\2\0\0Mac OS X        ",
    "train/._cat": b"x",
    "train/cat/.DS_Store": b"x",
    "__MACOSX/train/cat/0.png": "image",
    "train/__MACOSX/0.png": "image",
    "train/@eaDir/0.png": "image",
    "train/dog/@eaDir/0.png": "image",
    "train/$RECYCLE.BIN/0.png": "image",
    "train/cat/Thumbs.db": b"x",
    "train/cat/DESKTOP.INI": b"x",
    ".git/train/cat/0.png": "image",
    ".git/test/cat/0.png": "image",
}


@pytest.fixture
def image(encoded: Callable[..., bytes]) -> bytes:
    return encoded(np.full((8, 8, 3), 77, np.uint8))


@pytest.fixture
def clean(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """Two classes, without anything that does not belong to the set."""
    root = tmp_path / "clean"
    for part, count in (("train", 3), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for place in range(count):
                pixels = np.full((8, 8, 3), 100 * number + 10 * place, np.uint8)
                (root / part / name / f"{place}.png").write_bytes(encoded(pixels))
    return root


@pytest.fixture
def littered(clean: Path, image: bytes, tmp_path: Path) -> Path:
    """The same set with what systems and tools leave behind."""
    root = shutil.copytree(clean, tmp_path / "littered")
    for name, content in DROPPINGS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image if content == "image" else content)  # type: ignore[arg-type]
    return root


@pytest.mark.parametrize("name", DROPPINGS)
def test_droppings_are_no_members(name: str) -> None:
    assert not is_member(name)


@pytest.mark.parametrize("name", ["train/cat/0.png", "../up", "./x", "a..b/c.d.png", "Thumbs.db.png", "macosx", "..."])
def test_other_names_are_members(name: str) -> None:
    assert is_member(name) == (name != "...")


@given(st.lists(st.sampled_from(["a", "..", ".hidden", "__MACOSX", "x.png", "@eaDir", "Desktop.ini"]), min_size=1))
def test_a_path_is_a_member_if_each_of_its_parts_is(parts: list[str]) -> None:
    assert is_member("/".join(parts)) == all(is_member(part) for part in parts)


@pytest.mark.parametrize("residency", ["auto", "stream"])
def test_a_folder_and_its_zip_files_give_the_set_without_droppings(
    clean: Path, littered: Path, make_config: MakeConfig, residency: str
) -> None:
    expected = load_dataset(make_config(name="image_folder", root=str(clean), image_size=8))
    flat = shutil.make_archive(str(littered), "zip", littered)
    nested = shutil.make_archive(str(littered.parent / "nested"), "zip", littered.parent, littered.name)
    for root in (str(littered), flat, nested):
        found = load_dataset(make_config(name="image_folder", root=root, image_size=8, residency=residency))
        assert found.class_names == ("cat", "dog")
        assert found.train.labels.tolist() == expected.train.labels.tolist()
        if residency == "auto":
            assert found.fingerprint == expected.fingerprint


def test_a_bucket_gives_the_set_without_droppings(s3: Any, littered: Path, make_config: MakeConfig) -> None:
    for path in littered.rglob("*"):
        if path.is_file():
            s3.put(f"littered/{path.relative_to(littered).as_posix()}", path.read_bytes())
    config = make_config(name="image_folder", root="s3://images/littered", image_size=8)
    found = load_dataset(config)
    expected = load_dataset(make_config(name="image_folder", root=str(littered), image_size=8))
    assert found.fingerprint == expected.fingerprint
    copied = {path.name for path in Path(config.cache_dir).glob("s3/*/*/**/*") if path.is_file()}
    assert copied == {"0.png", "1.png", "2.png", ".listing.json"}


def test_a_zip_file_beside_droppings_is_the_set(littered: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    expected = load_dataset(make_config(name="image_folder", root=str(littered), image_size=8))
    (tmp_path / "beside" / "@eaDir").mkdir(parents=True)
    shutil.make_archive(str(tmp_path / "beside" / "set"), "zip", littered)
    (tmp_path / "beside" / "._set.zip").write_bytes(b"\0\5\x16\7")
    found = load_dataset(make_config(name="image_folder", root=str(tmp_path / "beside"), image_size=8))
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("place", [".cache", "__MACOSX", "@eaDir"])
def test_parquet_files_in_hidden_folders_are_no_part_of_the_set(
    tmp_path: Path, image: bytes, make_config: MakeConfig, place: str
) -> None:
    def write(path: Path, count: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = [number % 2 for number in range(count)]
        pq.write_table(pa.table({"image": [image] * count, "label": labels}), path)

    for folder in (tmp_path / "hub", tmp_path / "hub" / place):
        write(folder / "train-0.parquet", 6)
        write(folder / "test-0.parquet", 2)
    (tmp_path / "hub" / "._train-0.parquet").write_bytes(b"\0\5\x16\7")
    assert len(load_dataset(make_config(name="parquet", root=str(tmp_path / "hub"))).train) == 6


def test_several_sets_are_refused_by_name() -> None:
    refuse_several("x", ["a", "a", "a/"])
    refuse_several("x", [])
    with pytest.raises(
        ConfigError, match=r"^data\.root=x: holds 3 data sets: \., a/b, c; point it at one of them"
    ) as caught:
        refuse_several("x", ["c", "", "a/b", "c/"])
    assert caught.value.exit_code == 2


def test_files_are_counted_by_ending(caplog: pytest.LogCaptureFixture) -> None:
    notice_left_out("x", {"nowhere": []})
    assert not caplog.records
    notice_left_out("x", {"here": ["a.txt", "b.PNG", "c/d.png", "e", "f.png"], "nowhere": []})
    assert caplog.messages[0].endswith(": 3 .png, 1 .txt, 1 without ending here, such as a.txt")
    notice_left_out("x", {"here": [f"x.{number}" for number in range(10)]})
    assert ", 1 .5, 4 more here" in caplog.messages[1]
    notice_left_out("x", {"here": ["a.txt"], "nowhere": [], "there": ["b.png", "c.png"]})
    assert caplog.messages[2].endswith(": files left out: 1 .txt here, such as a.txt; 2 .png there, such as b.png")


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), (0, 1), (3, 0)])
def test_of_processes_that_train_together_one_speaks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, rank: int | None, lines: int
) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    with caplog.at_level(logging.WARNING):
        notice("%s", "text")
    assert len(caplog.records) == lines
