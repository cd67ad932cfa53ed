"""Small files beside what Ray keeps."""

from pathlib import Path

import pytest

from tla_service.cluster.storage import Folder
from tla_service.errors import UnavailableError


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    storage = Folder(str(tmp_path / "a"))
    assert (storage.read("x/y.json"), storage.folders()) == (None, [])
    storage.write("x/y.json", b"one")
    storage.write("x/y.json", b"two")
    assert (storage.read("x/y.json"), storage.folders()) == (b"two", ["x"])
    assert [path.name for path in (tmp_path / "a" / "x").iterdir()] == ["y.json"]
    (tmp_path / "a" / "file").write_text("in the way")
    with pytest.raises(UnavailableError, match=r"^scaling\.storage=.*: cannot be read or written .*--resume"):
        storage.write("file/y.json", b"three")
    with pytest.raises(UnavailableError, match="cannot be read or written"):
        Folder("nowhere://path")
    assert Folder("a/b").uri == str(Path("a/b").absolute())
