"""The journal in a folder and in a real S3 store; and that one driver at a time writes it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tuning.conftest import trial_of
from tla_service.errors import UnavailableError, UserError
from tla_service.tuning import lease as lease_module
from tla_service.tuning.journal import OWNER_FILE, Journal
from tla_service.tuning.lease import Lease
from tla_service.tuning.trial import Attempt


def exercise(storage: str) -> None:
    """Write, read back with another journal, write again."""
    journal = Journal(storage)
    assert journal.trials() == []
    assert journal.read("sweep.yaml") is None
    first, second = trial_of(0, [0.1, 0.2], point={"loss.margin": 0.1}), trial_of(1, [0.3])
    first.attempts.append(Attempt(chosen=1.5, ended=2.5))
    for trial in (second, first):
        journal.save(trial)
    journal.write("sweep.yaml", "a: 1")
    assert Journal(storage).trials() == [first, second]
    assert Journal(storage).read("sweep.yaml") == "a: 1"
    first.status = "stopped"
    journal.save(first)
    assert [trial.status for trial in Journal(storage).trials()] == ["stopped", "running"]


def test_a_folder(tmp_path: Path) -> None:
    exercise(str(tmp_path / "not" / "there yet"))


def test_a_write_that_was_cut_short_is_not_seen(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.save(trial_of(0, [0.1]))
    (tmp_path / "trials" / ".00001.json").write_text('{"number": 1, "poi')
    assert [trial.number for trial in Journal(str(tmp_path)).trials()] == [0]


def test_a_file_that_is_missing_or_damaged_is_said_so(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.save(trial_of(1, [0.1]))
    with pytest.raises(UnavailableError, match="of 1 trials not all are there"):
        journal.trials()
    (tmp_path / "trials" / "00000.json").write_text("{")
    with pytest.raises(UnavailableError, match="cannot be read or written"):
        journal.trials()


def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"scaling\.storage=/proc/nowhere: cannot be read or written"):
        Journal("/proc/nowhere").write("a", "b")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of a real S3 server; its address and keys are in the environment meanwhile."""
    script = os.environ.get("TLA_TEST_S3_SERVER")
    if script is None:
        pytest.skip("TLA_TEST_S3_SERVER names no server script")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("s3")
    command = [sys.executable, script]
    arguments = [str(folder), "--port", str(port), "--bucket", "sweeps"]
    subprocess.run([*command, "start", *arguments], check=True, capture_output=True, timeout=240)
    yield f"http://127.0.0.1:{port}"
    subprocess.run([*command, "stop", str(folder)], check=False, capture_output=True, timeout=60)


@pytest.mark.slow
def test_a_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "test:tester", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (keys | {"AWS_ENDPOINT_URL_S3": bucket}).items():
        monkeypatch.setenv(name, value)
    exercise("s3://sweeps/some/prefix")


def test_a_second_driver_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    first = Lease(journal, pytest.fail)
    assert (first.attempt, first.seconds_before) == (1, 0.0)
    with pytest.raises(UnavailableError, match=r"resume: another driver .process .* is at work on this sweep"):
        Lease(journal, pytest.fail)
    first.release()
    second = Lease(journal, pytest.fail)
    assert second.attempt == 2
    assert second.seconds_before > 0
    second.release()


def test_a_driver_that_was_killed_here_or_is_long_silent_elsewhere_counts_as_gone(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    driver = {
        "id": "a",
        "host": socket.gethostname(),
        "pid": gone.pid,
        "seen": time.time(),
        "seconds": 7.0,
        "attempt": 4,
    }
    journal.write(OWNER_FILE, json.dumps(driver))
    taken = Lease(journal, pytest.fail)
    assert (taken.attempt, taken.seconds_before) == (5, 7.0)
    taken.release()
    journal.write(OWNER_FILE, json.dumps(driver | {"host": "elsewhere"}))
    with pytest.raises(UnavailableError, match="on elsewhere"):
        Lease(journal, pytest.fail)
    journal.write(OWNER_FILE, json.dumps(driver | {"host": "elsewhere", "seen": time.time() - 61}))
    Lease(journal, pytest.fail).release()


def test_a_driver_whose_sweep_was_taken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.02)
    told: list[UserError] = []
    journal = Journal(str(tmp_path))
    mine = Lease(journal, told.append)
    time.sleep(0.1)
    assert not told
    other = json.loads(journal.read(OWNER_FILE) or "") | {"id": "another"}
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        journal.write(OWNER_FILE, json.dumps(other))
        time.sleep(0.05)
    assert "another driver has taken this sweep" in str(told[0])
    mine.release()
    assert json.loads(journal.read(OWNER_FILE) or "")["id"] == "another"
