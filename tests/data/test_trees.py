"""Folders and zip files as one kind of tree: links, archives of every tool, damaged and hostile ones."""

import io
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.data.decoding import is_image
from tla_service.data.trees import FolderTree
from tla_service.data.zip_tree import ZipTree, open_tree
from tla_service.errors import ConfigError, UnavailableError

PARTS = st.sampled_from(["a", "b", ".c", "__MACOSX", "d e", "é", "Thumbs.db", "0.png"])
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)


def pack(path: Path, files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name, target in (links or {}).items():
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, target)
    return path


def contents(tree: FolderTree | ZipTree) -> dict[str, bytes]:
    return {name: tree.read(name) for name in tree.names}


@settings(deadline=None, max_examples=30)
@given(names=st.lists(NAMES, max_size=6, unique=True), empty=st.lists(NAMES, max_size=2))
def test_a_zip_file_is_read_like_its_unpacked_folder(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], empty: list[str]
) -> None:
    home = tmp_path_factory.mktemp("tree")
    files = [name for name in names if not any(other.startswith(f"{name}/") for other in [*names, *empty])]
    with zipfile.ZipFile(home / "x.zip", "w") as archive:
        for name in files:
            archive.writestr(name, name.encode())
        for name in {name for name in empty if not any(f"{name}/".startswith(f"{file}/") for file in files)}:
            archive.writestr(f"{name}/", b"")
    with zipfile.ZipFile(home / "x.zip") as archive:
        archive.extractall(home / "folder")
    (home / "folder").mkdir(exist_ok=True)
    packed, plain = ZipTree(home / "x.zip"), FolderTree(home / "folder")
    assert packed.names == plain.names
    assert packed.folders == plain.folders
    assert contents(packed) == contents(plain)


def test_links_are_followed_in_folders_and_zip_files(tmp_path: Path) -> None:
    files = {"train/cat/0.png": b"cat", ".pool/1.png": b"pooled", "more/2.png": b"more", "more/in/3.png": b"inner"}
    links = {
        "train/cat/1.png": "../../.pool/1.png",
        "train/cat/4.png": "1.png",
        "train/dog": "../more",
        "more/4.png": "../train/cat/0.png",
    }
    root = tmp_path / "folder"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "train").mkdir(exist_ok=True)
    for name, target in links.items():
        (root / name).symlink_to(target)
    expected = {
        "more/2.png": b"more", "more/in/3.png": b"inner", "more/4.png": b"cat",
        "train/cat/0.png": b"cat", "train/cat/1.png": b"pooled",
        "train/cat/4.png": b"pooled", "train/dog/2.png": b"more", "train/dog/in/3.png": b"inner",
        "train/dog/4.png": b"cat",
    }  # fmt: skip
    for tree in (FolderTree(root), ZipTree(pack(tmp_path / "x.zip", files, links))):
        assert contents(tree) == expected
        assert tree.key(tree.names) != tree.key(tree.names[1:])
        assert {"train/cat", "train/dog", "train/dog/in"} <= tree.folders


@pytest.mark.parametrize("target", ["nowhere.png", "../../../outside.png", "/outside.png", "1.png"])
def test_links_to_nothing_are_refused_where_they_are_used(tmp_path: Path, target: str) -> None:
    if target != "1.png":  # a folder's link to itself is an error of the system
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "0.png").write_bytes(b"x")
        (tmp_path / "folder" / "1.png").symlink_to(target)
        folder = FolderTree(tmp_path / "folder")
        folder.key(["0.png"])
        for use in (lambda: folder.key(folder.names), lambda: folder.read("1.png")):
            with pytest.raises(UnavailableError, match=r"1\.png: is a link to a file that is not there"):
                use()
    links = {"1.png": "2.png", "2.png": "1.png"} if target == "1.png" else {"1.png": target}
    packed = ZipTree(pack(tmp_path / "x.zip", {"0.png": b"x"}, links))
    packed.key(["0.png"])
    for use in (lambda: packed.key(packed.names), lambda: packed.read("1.png")):
        with pytest.raises(UnavailableError, match=r"1\.png: is a link to a file that is not there"):
            use()


def test_links_back_to_a_folder_above_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder" / "train").mkdir(parents=True)
    (tmp_path / "folder" / "train" / "again").symlink_to("..")
    with pytest.raises(UnavailableError, match=r"train/again: is a link to a folder that holds it; remove the link"):
        FolderTree(tmp_path / "folder")
    for target in ("..", "../train", "."):
        with pytest.raises(UnavailableError, match=r"train/again: is a link to a folder that holds it"):
            ZipTree(pack(tmp_path / "x.zip", {"train/0.png": b"x"}, {"train/again": target}))


@pytest.mark.parametrize("name", ["../0.png", "train/../../0.png", "/train/0.png"])
def test_archives_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnavailableError, match=r"x\.zip: has an entry '.*0\.png' that leads outside"):
        ZipTree(pack(tmp_path / "x.zip", {name: b"x"}))


def test_names_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("./train/cat/0.png", b"0")
        windows = zipfile.ZipInfo("train\\cat\\1.png")
        windows.create_system, windows.filename = 0, "train\\cat\\1.png"
        archive.writestr(windows, b"1")
        archive.writestr("train/café/2.png", b"2")
    # As macOS packs: UTF-8 without the flag that says so.
    content = path.read_bytes().replace(b"\x00\x08", b"\x00\x00")
    path.write_bytes(content)
    tree = ZipTree(path)
    assert contents(tree) == {"train/cat/0.png": b"0", "train/cat/1.png": b"1", "train/café/2.png": b"2"}


def _changed(path: Path, local: int, central: int, value: int) -> Path:
    """Set a 16-bit field of all headers."""
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        place = content.find(signature)
        while place >= 0:
            content[place + offset : place + offset + 2] = value.to_bytes(2, "little")
            place = content.find(signature, place + 4)
    path.write_bytes(content)
    return path


def test_encrypted_archives_are_refused(tmp_path: Path) -> None:
    path = _changed(pack(tmp_path / "x.zip", {"train/cat/0.png": b"x"}), 6, 8, 1)
    with pytest.raises(UnavailableError, match=r"x\.zip: is encrypted; unpack it with its password"):
        open_tree(path)


def test_unknown_compression_is_named(tmp_path: Path) -> None:
    tree = ZipTree(_changed(pack(tmp_path / "x.zip", {"0.png": b"x" * 50}), 8, 10, 9))
    with pytest.raises(UnavailableError, match=r"0\.png: cannot be unpacked \(.*compression.*\); unpack the zip file"):
        tree.read("0.png")


@pytest.mark.parametrize(
    ("method", "header", "offset"),
    [
        (zipfile.ZIP_DEFLATED, b"PK\3\4", 30 + len("é.jfif".encode())),  # the data
        (zipfile.ZIP_LZMA, b"PK\3\4", 30 + len("é.jfif".encode()) + 9),
        (zipfile.ZIP_STORED, b"PK\3\4", 30),  # the name, which is UTF-8
        (zipfile.ZIP_STORED, b"PK\1\2", 44),  # where the data lie
    ],
)
def test_a_damaged_file_is_named_however_it_is_read(tmp_path: Path, method: int, header: bytes, offset: int) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("é.jfif", bytes(range(256)))
    blob = bytearray(path.read_bytes())
    blob[blob.index(header) + offset] = 0x7F if header == b"PK\1\2" else 0xFF
    path.write_bytes(blob)
    tree = ZipTree(path)
    with pytest.raises(UnavailableError, match=r"é\.jfif: damaged \(.+\); fetch the data set again"):
        tree.read("é.jfif")
    with pytest.raises(UnavailableError, match=r"é\.jfif: damaged \("), tree.open("é.jfif") as handle:
        is_image(handle)


def test_the_last_of_two_entries_of_one_name_counts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", b"old")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a", b"new")
    assert contents(ZipTree(tmp_path / "x.zip")) == {"a": b"new"}


def test_an_empty_class_is_refused_in_a_zip_file_too(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    root = tmp_path / "set"
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (root / place).mkdir(parents=True)
        (root / place / "0.png").write_bytes(encoded(np.zeros((4, 4, 3), np.uint8)))
    (root / "train" / "eel").mkdir()
    for path in (str(root), shutil.make_archive(str(root), "zip", root)):
        config = DataConfig(name="image_folder", root=path, image_size=4, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ConfigError, match="class 'eel' has no training images"):
            load_dataset(config)


def test_a_tree_can_be_read_in_part_and_after_pickling(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "a").write_bytes(b"0123456789")
    for tree in (FolderTree(tmp_path), ZipTree(pack(tmp_path / os.fsdecode(b"\xe9.zip"), {"a": b"0123456789"}))):
        again = pickle.loads(pickle.dumps(tree))
        with again.open("a") as handle:
            assert handle.read(4) == b"0123"
        assert isinstance(handle, io.IOBase)
        assert again.key(["a"]) == tree.key(["a"])


def test_unreadable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so the answer of the system is what is replaced.
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UnavailableError, match=r"data\.root=.*: no permission; check the path"):
        FolderTree(tmp_path)


def test_a_zip_file_that_lost_entries_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", {f"{number}.png": b"x" for number in range(5)})
    blob = bytearray(path.read_bytes())
    second = blob.index(b"PK\1\2", blob.index(b"PK\1\2") + 1)
    blob[second + 32] = 46 + len("2.png")  # the length of its comment, which swallows the next entry
    path.write_bytes(blob)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 4
    with pytest.raises(UnavailableError, match=r"x\.zip: damaged \(it lists 4 of 5 files\); fetch the data set again"):
        ZipTree(path)
    whole = pack(tmp_path / "y.zip", {"a": b"x"})
    with zipfile.ZipFile(whole, "a") as archive:
        archive.comment = b"a comment"
    for added in (b"", b"\n", bytes(512)):  # by a transfer
        with whole.open("ab") as file:
            file.write(added)
        assert ZipTree(whole).names == ["a"]


def test_what_links_to_folders_multiply_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "x.zip", {"a/x.png": b"x"}, {f"l{number}": "a" for number in range(9)})
    assert len(ZipTree(path).names) == 10
    monkeypatch.setattr("tla_service.data.zip_tree._MOST_ALIASES", 50)
    with pytest.raises(UnavailableError, match=r"its links to folders multiply its files; unpack it"):
        ZipTree(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr("tla_service.data.trees.MOST_BYTES", 1000)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(bytes(1001))
    tree = ZipTree(pack(tmp_path / "x.zip", {"a.png": bytes(1001)})) if packed else FolderTree(tmp_path / "folder")
    with pytest.raises(UnavailableError, match=r"a\.png: has 1001 bytes, more than the 1000 of the largest file"):
        tree.read("a.png")
