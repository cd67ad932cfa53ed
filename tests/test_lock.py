"""One process per folder, and a message that names it."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import LOCK_FILE, locked_folder

HOLD = """
import os, sys, time
from pathlib import Path
from tla_service.files import locked_folder
with locked_folder(Path(sys.argv[1]), "output"):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""
Process = subprocess.Popen[str]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start a process that holds a folder until its input ends."""
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught, locked_folder(folder, "output"):
        pass
    return str(caught.value)


def test_the_second_is_told_who_the_first_is(tmp_path: Path, hold: Callable[..., Process]) -> None:
    first = hold("--tracking.uri", "http://me:secret@server:5000")
    told = refusal(tmp_path / "run")
    assert "\n" not in told
    assert f"output={tmp_path / 'run'}: in use by process {first.pid} on {socket.gethostname()} since 20" in told
    assert "--tracking.uri http://server:5000" in told
    assert "secret" not in told
    assert told.endswith("; wait for it, end it, or choose another --output")


def test_it_is_free_and_leaves_nothing_when_the_first_has_ended(tmp_path: Path, hold: Callable[..., Process]) -> None:
    hold().communicate()
    with locked_folder(tmp_path / "run", "output"):
        assert names(tmp_path / "run") == [LOCK_FILE]
    assert names(tmp_path / "run") == []


@pytest.mark.parametrize("arguments", [(), ("fork",)])
def test_it_is_free_the_moment_the_first_is_killed(
    tmp_path: Path, hold: Callable[..., Process], arguments: tuple[str, ...]
) -> None:
    """Also when it has left a child: loader processes are forked."""
    first = hold(*arguments)
    refusal(tmp_path / "run")
    first.kill()
    first.wait()
    with locked_folder(tmp_path / "run", "output"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    if arguments:
        os.killpg(first.pid, signal.SIGKILL)


def test_a_holder_whose_folder_was_deleted_leaves_the_lock_of_the_next(
    tmp_path: Path, hold: Callable[..., Process]
) -> None:
    with locked_folder(tmp_path / "run", "output"):
        shutil.rmtree(tmp_path / "run")
        hold()
    assert names(tmp_path / "run") == [LOCK_FILE]
    refusal(tmp_path / "run")


def test_of_many_that_start_together_one_at_a_time_gets_it(tmp_path: Path) -> None:
    """Each writes begin and end, and none comes between another's, although the file is made and removed each time."""
    work = """
import sys
from pathlib import Path
from tla_service.errors import ConfigError
from tla_service.files import locked_folder
folder, got = Path(sys.argv[1]), 0
while got < 200:
    try:
        with locked_folder(folder / "run", "output"):
            for word in ("begin", "end"):
                with (folder / "log").open("a") as log:
                    log.write(word + "\\n")
            got += 1
    except ConfigError:
        pass
"""
    started = [subprocess.Popen([sys.executable, "-c", work, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(100) for process in started] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "begin\nend\n" * 600


def test_two_runs_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked_folder(tmp_path, "output"):
        assert f"in use by process {os.getpid()}" in refusal(tmp_path)
    with locked_folder(tmp_path, "output"):
        pass


def test_a_folder_that_cannot_be_written_is_unavailable() -> None:
    with (
        pytest.raises(UnavailableError, match=r"output=/proc/nowhere: cannot be written .*; choose another --output"),
        locked_folder(Path("/proc/nowhere"), "output"),
    ):
        pass


def test_a_file_system_without_locks_is_said_so_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with locked_folder(tmp_path, "output"):
        pass
    assert re.search("its file system has no locks .*; use it from one process at a time", caplog.text)
