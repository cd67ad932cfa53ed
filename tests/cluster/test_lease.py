"""One driver holds a folder: of drivers on this machine, and of those elsewhere."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tla_service.cluster import lease as lease_module
from tla_service.cluster.lease import LEASE, held
from tla_service.cluster.storage import Folder
from tla_service.errors import ConfigError


class Driver:
    """A process that holds a folder until it is told to end; forked, it need not import Ray again."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._holds, self._to_end = context.Event(), context.Event()
        self.process = context.Process(target=self._hold, args=(str(folder),))
        self.process.start()
        assert self._holds.wait(60)

    def _hold(self, folder: str) -> None:
        with held(Folder(folder), print):
            self._holds.set()
            self._to_end.wait()

    def end(self) -> None:
        self._to_end.set()
        self.process.join()


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[], Driver]]:
    """Start a driver that holds the folder."""
    started: list[Driver] = []

    def start() -> Driver:
        started.append(Driver(tmp_path / "run"))
        return started[-1]

    yield start
    for driver in started:
        driver.process.kill()
        driver.process.join()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "SILENT_SECONDS", 10.0)


def take_of(storage: str, say: Callable[[str], None] = pytest.fail) -> None:
    with held(Folder(storage), say):
        pass


def take(tmp_path: Path, say: Callable[[str], None] = pytest.fail) -> None:
    take_of(str(tmp_path / "run"), say)


def elsewhere(**fields: Any) -> dict[str, Any]:
    """The lease of a driver on another machine."""
    lease = {"host": "elsewhere", "pid": 1, "since": "2026-01-01", "command": "train", "machine": "m", "began": 1.0}
    return lease | {"id": "a", "beat": 0} | fields


def test_a_second_driver_on_this_machine_is_refused_at_once(tmp_path: Path, hold: Callable[[], Driver]) -> None:
    first = hold()
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"scaling\.storage=.*: in use by process {first.process.pid} on "):
        take(tmp_path)
    assert time.monotonic() - began < 10
    first.end()
    assert not (tmp_path / "run" / LEASE).exists()
    take(tmp_path)


def test_a_driver_that_was_killed_on_this_machine_is_taken_over_at_once(
    tmp_path: Path, hold: Callable[[], Driver]
) -> None:
    first = hold().process
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie: nobody has asked for its exit code
    take(tmp_path)
    first.join()
    assert first.exitcode == -signal.SIGKILL


def test_another_process_that_has_the_pid_of_the_dead_one_holds_nothing(tmp_path: Path) -> None:
    lease = elsewhere(**lease_module._this_process(), pid=os.getpid()) | {"began": 1.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LEASE).write_text(json.dumps(lease))
    take(tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_driver_elsewhere_that_is_silent_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "SILENT_SECONDS", 1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LEASE).write_text(json.dumps(elsewhere()))
    told: list[str] = []
    began = time.monotonic()
    take(tmp_path, told.append)
    assert time.monotonic() - began >= 1
    held = f"{tmp_path}/run was held by process 1 on elsewhere since 2026-01-01: train"
    assert told == [f"{held}; watching for up to 1 s if it still is"]


@pytest.mark.usefixtures("quick")
def test_a_driver_elsewhere_that_lives_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real holder, which the second takes for one on another machine."""
    with held(Folder(str(tmp_path / "run")), print):
        monkeypatch.setattr(lease_module, "_this_process", lambda: {"machine": "another", "began": 2.0})
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "):
            take(tmp_path, print)


@pytest.mark.usefixtures("quick")
def test_a_driver_whose_folder_was_taken_is_told(tmp_path: Path) -> None:
    with held(Folder(str(tmp_path / "run")), print) as lease:
        time.sleep(0.2)
        lease.check()
        deadline = time.monotonic() + 10
        with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"):
            while time.monotonic() < deadline:
                (tmp_path / "run" / LEASE).write_text(json.dumps(elsewhere()))
                time.sleep(0.02)
                lease.check()
    assert json.loads((tmp_path / "run" / LEASE).read_text())["id"] == "a"


@pytest.mark.usefixtures("quick")
def test_a_storage_that_is_away_for_a_while_ends_nothing(tmp_path: Path) -> None:
    with held(Folder(str(tmp_path / "run")), print) as lease:
        (tmp_path / "run").rename(tmp_path / "away")
        (tmp_path / "run").write_text("no folder")
        time.sleep(0.3)
        lease.check()
        (tmp_path / "run").unlink()
        (tmp_path / "away").rename(tmp_path / "run")
        before = json.loads((tmp_path / "run" / LEASE).read_text())["beat"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / "run" / LEASE).read_text())["beat"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "a"}'])
def test_a_lease_that_cannot_be_read_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LEASE).write_text(text)
    take(tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_bucket(s3: Any) -> None:
    storage = f"s3://{s3.bucket}/some/run"
    with held(Folder(storage), print) as lease:
        time.sleep(0.2)
        lease.check()
        with pytest.raises(ConfigError, match=rf"scaling\.storage={storage}: in use by process {os.getpid()} on "):
            take_of(storage, print)
    take_of(storage)
