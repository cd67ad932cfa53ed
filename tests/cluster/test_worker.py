"""What the driver is told of epochs and warnings, and which checkpoints stay."""

import contextlib
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from tla_service.cluster.mailbox import FailuresToMailbox
from tla_service.cluster.reporter import RayReporter, WarningsToMailbox
from tla_service.cluster.storage import RunFolder
from tla_service.errors import OutOfMemoryError, UnavailableError


class Mailbox:
    """Takes records as the driver's mailbox does, without a process of its own."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.push = SimpleNamespace(remote=self.records.append)


def begin(reporter: RayReporter, metrics: dict[str, float] | None, name: str) -> Path:
    checkpoint = reporter.destination(name)
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_text(name)
    reporter.report(metrics, checkpoint, name)
    return checkpoint


def report(reporter: RayReporter, metrics: dict[str, float] | None, name: str) -> None:
    checkpoint = begin(reporter, metrics, name)
    assert reporter.finish() == name
    assert not checkpoint.parent.exists()


def test_a_checkpoint_within_an_epoch_is_no_epoch(tmp_path: Path) -> None:
    mailbox, metrics = Mailbox(), {"epoch": 0.0, "train/loss": 1.0}
    reporter = RayReporter(mailbox, RunFolder(str(tmp_path), "run"), is_main=True)
    reporter.report(metrics, None, "")
    report(reporter, None, "step-000000006")
    assert mailbox.records == [{"event": "epoch", "metrics": metrics, "checkpoint": False}]
    others = Mailbox()
    RayReporter(others, RunFolder(str(tmp_path), "run"), is_main=False).report(metrics, None, "step-000000008")
    assert others.records == []


def test_the_last_two_checkpoints_stay_whoever_wrote_the_others(tmp_path: Path) -> None:
    """Of an earlier attempt there are one that is whole and a damaged one, which is written again."""
    run = tmp_path / "run"
    reporter = RayReporter(Mailbox(), RunFolder(str(tmp_path), "run"), is_main=True)
    for name in ("step-2", "step-4"):
        (run / name).mkdir(parents=True)
    (run / "held_by.json").write_text("")
    there = []
    for name in ("step-4", "step-4", "step-6", "step-8"):
        report(reporter, {"epoch": 0.0}, name)
        there.append(sorted(path.name for path in run.glob("step-*")))
    assert there == [["step-2", "step-4"], ["step-2", "step-4"], ["step-4", "step-6"], ["step-6", "step-8"]]
    assert (run / "step-8" / "model.safetensors").read_text() == "step-8"
    assert (run / "held_by.json").exists()


def test_what_a_killed_worker_left_of_an_upload_is_removed(tmp_path: Path) -> None:
    mine, other = (
        RayReporter(Mailbox(), RunFolder(str(tmp_path), name), is_main=True).destination("step-2").parent
        for name in ("run", "another")
    )
    RayReporter(Mailbox(), RunFolder(str(tmp_path), "run"), is_main=False)
    assert mine.exists()
    RayReporter(Mailbox(), RunFolder(str(tmp_path), "run"), is_main=True)
    assert (mine.exists(), other.exists()) == (False, True)
    other.rmdir()


def test_a_repeated_upload_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = RayReporter(Mailbox(), RunFolder(str(tmp_path), "run"), is_main=True)
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda *_, **__: None)
        killed.setattr("tla_service.cluster.storage.copy_files", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            RunFolder(str(tmp_path), "run").save(tmp_path, "step-2")
    assert len([*(tmp_path / "run").glob(".*.part")]) == 1
    report(reporter, {"epoch": 0.0}, "step-2")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"step-2", "latest.json"}


def test_checkpoints_are_stored_in_the_background_one_at_a_time(tmp_path: Path) -> None:
    folder, may_write, events = RunFolder(str(tmp_path), "run"), threading.Event(), []
    save = folder.save

    def slow(checkpoint: Path, name: str) -> None:
        events.append(f"begins {name}")
        assert may_write.wait(60)
        save(checkpoint, name)
        events.append(f"ends {name}")

    folder.save = slow  # type: ignore[method-assign]
    reporter = RayReporter(Mailbox(), folder, is_main=True)
    begin(reporter, {"epoch": 0.0}, "step-2")
    assert "ends step-2" not in events  # training goes on
    threading.Timer(0.2, may_write.set).start()
    begin(reporter, {"epoch": 0.0}, "step-4")
    assert "ends step-2" in events
    assert reporter.finish() == "step-4"
    assert events == ["begins step-2", "ends step-2", "begins step-4", "ends step-4"]


def test_a_checkpoint_that_cannot_be_stored_ends_the_run_at_the_next(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, where a folder should be")
    reporter = RayReporter(Mailbox(), RunFolder(str(tmp_path), "run"), is_main=True)
    checkpoints = [reporter.destination(name) for name in ("step-2", "step-4")]
    for checkpoint, waits in zip(checkpoints, (False, True), strict=True):
        checkpoint.mkdir()
        with pytest.raises(UnavailableError, match=r"^scaling\.storage=") if waits else contextlib.nullcontext():
            reporter.report({"epoch": 0.0}, checkpoint, checkpoint.name)
    with pytest.raises(UnavailableError, match=r"^scaling\.storage="):
        reporter.finish()
    assert not any(checkpoint.parent.exists() for checkpoint in checkpoints)


def test_a_warning_of_a_worker_reaches_the_driver() -> None:
    mailbox, log = Mailbox(), logging.getLogger("tla_service.cluster.storage")
    handler = WarningsToMailbox(mailbox)
    logging.getLogger("tla_service").addHandler(handler)
    try:
        log.warning("Writing %s failed", "x")
        log.info("nothing")
    finally:
        logging.getLogger("tla_service").removeHandler(handler)
    assert mailbox.records == [{"event": "warning", "message": "Writing x failed"}]


def test_a_worker_killed_for_lack_of_memory_is_told_with_what_to_lower() -> None:
    # What Ray 2.60 says of a worker that its memory monitor has killed.
    low = "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: cc90)"
    low += " was 7.18GB used / 23.54GB limit (0.304923)"
    killed = RuntimeError(f"A worker health check failed.\n{low}\nOOM kill reason: Memory usage\nRefer to the docs")
    mailbox = Mailbox()
    callback = FailuresToMailbox(mailbox, "lower the batch")
    lacking = OutOfMemoryError("training.global_batch_size", 8, "out of memory", "lower it")
    callback.after_exception(None, {0: RuntimeError("closed"), 1: lacking})
    callback.after_exception(None, {1: killed})
    callback.after_exception(None, {1: RuntimeError("other")})
    callback.after_exception(None, {1: AssertionError()})
    text = "training.global_batch_size=8: out of memory; lower it"
    assert [(record["message"], record["lacks_memory"]) for record in mailbox.records] == [
        (f"workers failed: {{0: 'closed', 1: '{text}'}}; if memory was the cause: lower the batch", lacking),
        (f"workers failed: {{1: '{low}'}}; if memory was the cause: lower the batch", None),
        ("workers failed: {1: 'other'}", None),
        ("workers failed: {1: 'AssertionError'}", None),
    ]
