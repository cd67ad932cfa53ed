"""What Ray's controller is told of reports, and which checkpoints stay."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.train import Checkpoint

from tla_service.cluster.worker import EpochsToMailbox


class Mailbox:
    """Takes records as the driver's mailbox does, without a process of its own."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.push = SimpleNamespace(remote=self.records.append)


def test_a_checkpoint_within_an_epoch_is_no_epoch(tmp_path: Path) -> None:
    mailbox = Mailbox()
    callback = EpochsToMailbox(mailbox, 2)
    metrics = {"epoch": 0.0, "train/loss": 1.0}
    callback.after_report(None, [metrics, metrics], None)
    callback.after_report(None, [{}, {}], Checkpoint.from_directory(tmp_path / "step-000000006"))
    assert mailbox.records == [{"event": "epoch", "metrics": metrics, "checkpoint": False}]


def test_the_last_two_checkpoints_stay_whoever_wrote_the_others(tmp_path: Path) -> None:
    """Of an earlier attempt there are one that is whole and a damaged one, which is written again."""
    callback = EpochsToMailbox(Mailbox(), 2)
    there = []
    for name in ("step-2", "step-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "held_by.json").write_text("")
    for name in ("step-4", "step-4", "step-6", "step-8"):
        (tmp_path / name).mkdir(exist_ok=True)
        callback.after_report(None, [{"epoch": 0.0}], Checkpoint.from_directory(tmp_path / name))
        there.append(sorted(path.name for path in tmp_path.iterdir() if path.name != "held_by.json"))
    assert there == [["step-2", "step-4"], ["step-2", "step-4"], ["step-4", "step-6"], ["step-6", "step-8"]]
    assert (tmp_path / "held_by.json").exists()
