"""Metrics arrive once each, whatever happens to the server or to the process."""

import errno
import io
import json
import logging
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.cluster.gate import gate_to
from tests.registry.tracking_server import TrackingServer, config_for
from tla_service.tracking import run_log as run_log_module
from tla_service.tracking.run_log import RunLog
from tla_service.tracking.runs import open_run


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, key)]


@pytest.fixture
def local_run(local_uri: str) -> str:
    return open_run(config_for(local_uri), "run", facts={})


def test_every_point_arrives_in_order_and_nothing_stays_on_disk(local_uri: str, local_run: str, tmp_path: Path) -> None:
    log = RunLog(local_uri, local_run, tmp_path / "spill")
    for step in range(2500):
        log.log({"loss/total": step / 2}, step)
    assert log.close()
    assert history(local_uri, local_run, "loss/total") == [(step, step / 2) for step in range(2500)]
    assert list((tmp_path / "spill").iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        log.log({"loss/total": 1.0}, 0)


def test_replayed_epochs_are_not_sent_twice(local_uri: str, local_run: str, tmp_path: Path) -> None:
    for steps in (range(3), range(1, 5)):
        log = RunLog(local_uri, local_run, tmp_path)
        for step in steps:
            log.log({"a": float(step), "b": -float(step)}, step)
            log.log({"a": 99.0}, step)
        assert log.close()
    assert history(local_uri, local_run, "a") == [(step, float(step)) for step in range(5)]
    assert history(local_uri, local_run, "b") == [(step, -float(step)) for step in range(5)]


def test_a_run_that_is_deleted_meanwhile_keeps_its_points(
    local_uri: str, local_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log_module, "_LAST_WAIT_SECONDS", 0.5)
    MlflowClient(local_uri).delete_run(local_run)
    log = RunLog(local_uri, local_run, tmp_path)
    log.log({"a": 1.0, "nan": math.nan}, 0)
    assert not log.flush(1.0)
    MlflowClient(local_uri).restore_run(local_run)
    assert log.close()
    assert history(local_uri, local_run, "a") == [(0, 1.0)]
    assert math.isnan(history(local_uri, local_run, "nan")[0][1])


def test_a_server_away_and_back_loses_and_doubles_nothing(
    server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log_module, "_LAST_WAIT_SECONDS", 0.5)
    caplog.set_level(logging.INFO, logger=run_log_module.__name__)
    run_id = open_run(config_for(server.uri), "outage", facts={})
    with gate_to(server.uri) as gate:
        log = RunLog(gate.address, run_id, tmp_path)
        log.log({"a": 0.0, "b": 0.0}, 0)
        assert log.flush(20)
        gate.shut()
        before = time.monotonic()
        for step in range(1, 50):
            log.log({"a": float(step), "b": float(step)}, step)
        assert time.monotonic() - before < 10, "logging must not wait for the server"
        assert not log.flush(1)
        assert sum(len(file.read_text().splitlines()) for file in tmp_path.iterdir()) == 98, "what is unsent is on disk"
        gate.open()
        assert log.flush(30)
        assert log.close()
    for key in ("a", "b"):
        assert history(server.uri, run_id, key) == [(step, float(step)) for step in range(50)]
    away, back = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "takes no metrics" in away
    assert "is back" in back


def test_killed_process_leaves_its_points_to_the_next(local_uri: str, local_run: str, tmp_path: Path) -> None:
    def work() -> None:
        log = RunLog("http://127.0.0.1:9", local_run, tmp_path / "spill")
        for step in range(20):
            log.log({"a": float(step)}, step)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "spill").iterdir()
    with left.open("ab") as file:
        file.write(b'["a", 20.0, 17')  # a line the process could not finish
    log = RunLog(local_uri, local_run, tmp_path / "spill")
    log.log({"a": 20.0}, 20)
    assert log.close()
    assert history(local_uri, local_run, "a") == [(step, float(step)) for step in range(21)]
    assert list((tmp_path / "spill").iterdir()) == []


def test_closing_while_the_server_is_away_keeps_the_points(
    local_uri: str, local_run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spill = tmp_path / "spill"
    log = RunLog("http://127.0.0.1:9", local_run, spill)
    log.log({"a": 1.5}, 7)
    assert not log.close(timeout_seconds=0.2)
    assert not log.close()
    assert "kept in" in caplog.text
    (left,) = spill.iterdir()
    assert json.loads(left.read_text())[:2] == ["a", 1.5]
    assert RunLog(local_uri, local_run, spill).close()
    assert history(local_uri, local_run, "a") == [(7, 1.5)]


def test_what_a_process_of_an_earlier_version_left_is_sent(local_uri: str, local_run: str, tmp_path: Path) -> None:
    (tmp_path / f"{local_run}-1-00000000.jsonl").write_text('["a", 1.0, 1, 0]\n["a", 2.0, 1, 1')
    other = tmp_path / f"{'0' * 32}.jsonl"
    other.write_text('["a", 1.0, 1, 0]\n')
    log = RunLog(local_uri, local_run, tmp_path)
    log.log({"a": 2.0}, 1)
    assert log.close()
    assert history(local_uri, local_run, "a") == [(0, 1.0), (1, 2.0)]
    assert [path for path in tmp_path.iterdir() if path.suffix == ".jsonl"] == [other]


class Disk(io.FileIO):
    """A file on a disk that may be full."""

    is_full = False

    def write(self, data: Any) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data) or 0


@pytest.mark.parametrize("recovers", [True, False])
def test_a_full_disk_ends_neither_the_log_nor_the_run(
    local_uri: str, local_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recovers: bool
) -> None:
    disk = Disk(tmp_path / f"{local_run}.jsonl", "a+")
    monkeypatch.setattr(run_log_module, "_open", lambda _: io.BufferedRandom(disk))
    log = RunLog(local_uri, local_run, tmp_path)
    log.log({"a": 0.0}, 0)
    assert log.flush(20)
    disk.is_full = True
    log.log({"a": 1.0}, 1)
    assert log.unsent_bytes() == 0
    if recovers:
        disk.is_full = False
        log.log({"a": 2.0}, 2)
    assert log.close()
    assert history(local_uri, local_run, "a") == [(step, float(step)) for step in range(3 if recovers else 1)]
