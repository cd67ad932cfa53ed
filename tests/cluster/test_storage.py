"""A run's folder in the storage: Ray's record of it, its checkpoints, and the one driver that holds it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tla_service.cluster import storage as storage_module
from tla_service.cluster.storage import RunFolder, earlier_name
from tla_service.config import RunConfig
from tla_service.config_loading import to_yaml
from tla_service.errors import ConfigError, UnavailableError

RECORD = "checkpoint_manager_snapshot.json"
LEASE = "held_by.json"


def make_folder(tmp_path: Path, record: str | None, *checkpoints: str) -> RunFolder:
    for name in checkpoints:
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    if record is not None:
        (tmp_path / "run" / RECORD).write_text(record)
    return RunFolder(str(tmp_path), "run")


def record_of(latest: str | None) -> str:
    found = None if latest is None else {"checkpoint_dir_name": latest, "metrics": {}}
    return json.dumps({"ray_version": "2.60.0", "checkpoint_results": [], "latest_checkpoint_result": found})


def test_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    assert RunFolder(str(tmp_path), "nobody").checkpoints() == []
    folder = make_folder(tmp_path, None, "step-000000008", "step-000000016", "step-000000004", "other")
    found = [checkpoint.path for checkpoint in folder.checkpoints()]
    assert found == [str(tmp_path / "run" / f"step-{step:09d}") for step in (16, 8, 4)]


@pytest.mark.parametrize("latest", ["step-000000008", None])
def test_a_good_record_goes_without_a_word(tmp_path: Path, latest: str | None) -> None:
    folder = make_folder(tmp_path, record_of(latest), "step-000000004", "step-000000008")
    assert folder.forget_record() == ""
    assert not (tmp_path / "run" / RECORD).exists()
    assert folder.forget_record() == ""


WRONG = {
    "names what is gone": (record_of("step-000000016"), "checkpoint {run}/step-000000016 is missing"),
    "cut short": (record_of("step-000000008")[:70], "Ray's record of checkpoints, {run}/{record}, is damaged"),
    "empty": ("", "Ray's record of checkpoints, {run}/{record}, is damaged"),
    "something else": ("[1, 2]", "Ray's record of checkpoints, {run}/{record}, is damaged"),
    "of another version": ('{"results": []}', "Ray's record of checkpoints, {run}/{record}, is damaged"),
}


@pytest.mark.parametrize(("record", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_record_is_said(tmp_path: Path, record: str, wrong: str) -> None:
    wrong = wrong.format(run=tmp_path / "run", record=RECORD)
    folder = make_folder(tmp_path, record, "step-000000004", "step-000000008")
    assert folder.forget_record() == f"{wrong}; falling back to {tmp_path}/run/step-000000008"
    assert not (tmp_path / "run" / RECORD).exists()


@pytest.mark.parametrize(("record", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_a_record_of_checkpoints_that_are_all_gone_ends_with_3(tmp_path: Path, record: str, wrong: str) -> None:
    folder = make_folder(tmp_path, record)
    with pytest.raises(UnavailableError) as caught:
        folder.forget_record()
    wrong = wrong.format(run=tmp_path / "run", record=RECORD)
    remedy = f"restore its files, or delete {tmp_path}/run to start over"
    assert str(caught.value) == f"scaling.storage={tmp_path}: {wrong}, and no other is left; {remedy}"
    assert (tmp_path / "run" / RECORD).read_text() == record


def test_a_storage_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"scaling\.storage=nowhere://x: cannot be read or written"):
        RunFolder("nowhere://x", "run")
    with (
        pytest.raises(UnavailableError, match=r"scaling\.storage=/proc/nowhere: cannot be read or written"),
        RunFolder("/proc/nowhere", "run").held(print),
    ):
        pass


def test_a_run_is_found_under_the_name_that_an_earlier_version_made(tmp_path: Path) -> None:
    storage, config, other = str(tmp_path), RunConfig(), RunConfig(seed=0, method="tla_sa")
    assert earlier_name(config, storage) == config
    for name, saved in (("digits-tla-s0-00000000", other), ("digits-tla-s0-0badcafe", config)):
        (tmp_path / name / "step-000000004").mkdir(parents=True)
        (tmp_path / name / "step-000000004" / "config.yaml").write_text(to_yaml(saved))
    assert earlier_name(config, storage).name == "digits-tla-s0-0badcafe"
    assert earlier_name(RunConfig(name="mine"), storage).name == "mine"
    (tmp_path / config.run_name).mkdir()
    assert earlier_name(config, storage) == config


# ------------------------------------------------------------------------------------------------ one driver

HOLD = """
import sys
from tla_service.cluster.storage import RunFolder
with RunFolder(sys.argv[1], "run").held(print):
    print("held", flush=True)
    sys.stdin.read()
"""
Process = subprocess.Popen[str]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Start a driver that holds the folder until its input ends."""
    started: list[Process] = []

    def start() -> Process:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], text=True, **pipes))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(storage_module, "SILENT_SECONDS", 1.0)


def take_of(storage: str, say: Callable[[str], None] = pytest.fail) -> None:
    with RunFolder(storage, "run").held(say):
        pass


def take(tmp_path: Path, say: Callable[[str], None] = pytest.fail) -> None:
    take_of(str(tmp_path), say)


def elsewhere(**fields: Any) -> dict[str, Any]:
    """The lease of a driver on another machine."""
    lease = {"host": "elsewhere", "pid": 1, "since": "2026-01-01", "command": "train", "machine": "m", "began": 1.0}
    return lease | {"id": "a", "beat": 0} | fields


def test_a_second_driver_on_this_machine_is_refused_at_once(tmp_path: Path, hold: Callable[[], Process]) -> None:
    first = hold()
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"scaling\.storage=.*: in use by process {first.pid} on "):
        take(tmp_path)
    assert time.monotonic() - began < 2
    first.communicate()
    assert not (tmp_path / "run" / LEASE).exists()
    take(tmp_path)


def test_a_driver_that_was_killed_on_this_machine_is_taken_over_at_once(
    tmp_path: Path, hold: Callable[[], Process]
) -> None:
    first = hold()
    os.kill(first.pid, signal.SIGKILL)
    time.sleep(0.2)  # it is dead, and a zombie: nobody has asked for its exit code
    take(tmp_path)
    assert first.wait() == -signal.SIGKILL


def test_another_process_that_has_the_pid_of_the_dead_one_holds_nothing(tmp_path: Path) -> None:
    lease = elsewhere(**storage_module._process(os.getpid()), pid=os.getpid()) | {"began": 1.0}
    make_folder(tmp_path, None)
    (tmp_path / "run" / LEASE).write_text(json.dumps(lease))
    take(tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_driver_elsewhere_that_is_silent_is_taken_over(tmp_path: Path) -> None:
    make_folder(tmp_path, None)
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
    with RunFolder(str(tmp_path), "run").held(print):
        monkeypatch.setattr(storage_module, "_process", lambda _pid: {"machine": "another", "began": 2.0})
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "):
            take(tmp_path, print)


@pytest.mark.usefixtures("quick")
def test_a_driver_whose_folder_was_taken_is_told(tmp_path: Path) -> None:
    with RunFolder(str(tmp_path), "run").held(print) as check:
        time.sleep(0.2)
        check()
        deadline = time.monotonic() + 10
        with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"):
            while time.monotonic() < deadline:
                (tmp_path / "run" / LEASE).write_text(json.dumps(elsewhere()))
                time.sleep(0.02)
                check()
    assert json.loads((tmp_path / "run" / LEASE).read_text())["id"] == "a"


@pytest.mark.usefixtures("quick")
def test_a_storage_that_is_away_for_a_while_ends_nothing(tmp_path: Path) -> None:
    with RunFolder(str(tmp_path), "run").held(print) as check:
        (tmp_path / "run").rename(tmp_path / "away")
        (tmp_path / "run").write_text("no folder")
        time.sleep(0.3)
        check()
        (tmp_path / "run").unlink()
        (tmp_path / "away").rename(tmp_path / "run")
        before = json.loads((tmp_path / "run" / LEASE).read_text())["beat"]
        time.sleep(0.3)
        assert json.loads((tmp_path / "run" / LEASE).read_text())["beat"] > before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "a"}'])
def test_a_lease_that_cannot_be_read_holds_nothing(tmp_path: Path, text: str) -> None:
    make_folder(tmp_path, None)
    (tmp_path / "run" / LEASE).write_text(text)
    take(tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_bucket(s3: Any) -> None:
    storage = f"s3://{s3.bucket}/some/runs"
    folder = RunFolder(storage, "run")
    assert folder.checkpoints() == []
    assert folder.forget_record() == ""
    for step in (4, 8):
        s3.put(f"some/runs/run/step-{step:09d}/manifest.json", b"{}")
    s3.put("some/runs/run/step-000000008/config.yaml", to_yaml(RunConfig()).encode())
    s3.put(f"some/runs/run/{RECORD}", record_of("step-000000012").encode())
    (newest, _) = folder.checkpoints()
    with newest.as_directory() as local:
        assert sorted(path.name for path in Path(local).iterdir()) == ["config.yaml", "manifest.json"]
    run = f"{s3.bucket}/some/runs/run"
    assert folder.forget_record() == f"checkpoint {run}/step-000000012 is missing; falling back to {run}/step-000000008"
    assert folder.forget_record() == ""
    with folder.held(print) as check:
        time.sleep(0.2)
        check()
        with pytest.raises(ConfigError, match=rf"scaling\.storage={storage}: in use by process {os.getpid()} on "):
            take_of(storage, print)
    take_of(storage)
    s3.put("some/runs/digits-tla-s0-0badcafe/step-000000004/config.yaml", to_yaml(RunConfig()).encode())
    assert earlier_name(RunConfig(), storage).name == "digits-tla-s0-0badcafe"
