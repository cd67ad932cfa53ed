"""Files and folders that are whole or absent, also when their writer is killed."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tla_service.errors import UnavailableError
from tla_service.files import expanded, remove_parts, whole_file, whole_folder, write_whole

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from tla_service.files import whole_file, whole_folder
kind, target = sys.argv[1], Path(sys.argv[2])
with (whole_file if kind == "file" else whole_folder)(target) as part:
    for path in [part] if kind == "file" else [part / "a", part / "b"]:
        path.write_text("half")
        if path.name != "a":
            os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "ä")
    assert (tmp_path / "a").read_bytes() == "ä".encode()
    write_whole(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").read_bytes() == b"\x00"
    assert names(tmp_path) == ["a"]


def test_a_home_folder_that_is_not_there() -> None:
    assert expanded("output", "~/a") == Path.home() / "a"
    with pytest.raises(UnavailableError, match="output=~nosuchuser/a: no home folder; give an absolute path"):
        expanded("output", "~nosuchuser/a")


def test_others_may_read_what_they_could_read_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    write_whole(tmp_path / "file", "")
    with whole_folder(tmp_path / "whole"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_raises_leaves_the_old_and_nothing_else(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    write_whole(target, "old") if kind == "file" else target.mkdir()
    with pytest.raises(KeyboardInterrupt), (whole_file if kind == "file" else whole_folder)(target):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_writer_leaves_the_old_and_a_part_that_can_be_removed(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    else:
        target.mkdir()
        (target / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, kind, str(target)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (target if kind == "file" else target / "a").read_text() == "old"
    assert len(names(tmp_path)) == 2
    remove_parts(tmp_path)
    assert names(tmp_path) == ["target"]


def test_a_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "new" / "f") as part:
        (part / "old").write_text("1")
    with whole_folder(tmp_path / "new" / "f") as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text("2")
        assert names(tmp_path / "new" / "f") == ["old"]
    assert names(tmp_path / "new") == ["f"]
    assert names(tmp_path / "new" / "f") == ["inner"]


def test_threads_that_write_one_file_leave_one_of_their_texts(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_whole, args=(tmp_path / "a", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in texts
    assert names(tmp_path) == ["a"]
