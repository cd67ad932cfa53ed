"""What a run leaves in its folder without Ray: the log, and the checkpoints it may go on from."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tla_service.training.checkpoint import MANIFEST
from tla_service.training.reporting import JsonLines, LocalReporter, Terminal

EPOCH = {"epoch": 0.0, "step": 4.0, "train/loss": 1.5, "images_per_second": 80.0}
STEP = {
    "event": "step", "epoch": 0, "step": 2, "total_steps": 8, "loss": 1.25, "images_per_second": 80.0,
    "seconds_left": 3.0,
}  # fmt: skip


class Output:
    """A reporter's folder and terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed = folder / "output", io.StringIO()
        self.reporter = LocalReporter(self.folder, terminal=Terminal(self.printed))

    def checkpoint(self, name: str, content: str) -> Path:
        """A checkpoint as `fit` hands it over: in its place already."""
        made = self.reporter.destination(name)
        made.mkdir(parents=True, exist_ok=True)
        (made / "model.safetensors").write_text(content)
        (made / MANIFEST).write_text("{}")
        return made

    def report(self, name: str, content: str = "weights") -> None:
        self.reporter.report(EPOCH, self.checkpoint(name, content), name)

    def kept(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    made = Output(tmp_path)
    yield made
    made.reporter.close()


def test_records_are_logged_in_their_order_and_shown(output: Output) -> None:
    output.reporter.progress(STEP)
    output.reporter.report(EPOCH, None, "")
    output.reporter.progress({"event": "collapse", "message": "robust accuracy has collapsed"})
    lines = [json.loads(line) for line in (output.folder / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("time") > 0 for line in lines)
    assert lines == [
        STEP,
        {"event": "epoch", "metrics": EPOCH},
        {"event": "collapse", "message": "robust accuracy has collapsed"},
    ]
    # Steps get a line every ten seconds where there is no bar.
    assert output.printed.getvalue().splitlines() == [
        "epoch   0  step 4  loss 1.5000  80 images/s",
        "robust accuracy has collapsed",
    ]
    assert not (output.folder / "checkpoints").exists()


def test_a_run_may_take_longer_than_a_day(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "SECONDS_BETWEEN_LINES", 0.0)
    output.reporter.progress(STEP | {"seconds_left": 90_061.5})
    assert output.printed.getvalue().endswith("25:01:01 left\n")


def test_the_two_newest_checkpoints_are_kept_with_what_they_hold(output: Output) -> None:
    assert output.reporter.latest() is None
    for step in (8, 9, 10, 110):
        output.report(f"step-{step:09d}", f"weights of step {step}")
        assert output.reporter.latest() == output.folder / "checkpoints" / f"step-{step:09d}"
    assert output.kept() == ["step-000000010", "step-000000110"]
    for step in (10, 110):
        folder = output.folder / "checkpoints" / f"step-{step:09d}"
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "model.safetensors": f"weights of step {step}",
            MANIFEST: "{}",
        }


def test_a_checkpoint_made_again_replaces_the_first(output: Output) -> None:
    for content in ("first", "again"):
        output.report("step-000000004", content)
    (found,) = (output.folder / "checkpoints").glob("step-*")
    assert (found / "model.safetensors").read_text() == "again"


def test_a_folder_without_a_manifest_is_no_checkpoint(output: Output) -> None:
    output.report("step-000000004")
    half = output.folder / "checkpoints" / "step-000000008"
    half.mkdir()
    (half / "model.safetensors").write_text("half of them")
    latest = output.reporter.latest()
    assert latest is not None
    assert latest.name == "step-000000004"


def test_a_new_process_finds_the_checkpoints_and_goes_on_with_the_log(output: Output, tmp_path: Path) -> None:
    output.report("step-000000004")
    output.reporter.close()
    again = Output(tmp_path)
    assert again.reporter.latest() == output.folder / "checkpoints" / "step-000000004"
    again.reporter.progress(STEP)
    again.reporter.close()
    events = [json.loads(line)["event"] for line in (output.folder / "log.jsonl").read_text().splitlines()]
    assert events == ["epoch", "step"]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    printed = io.StringIO()
    reporter = LocalReporter(tmp_path / "output", is_main=False, terminal=Terminal(printed))
    reporter.progress(STEP)
    reporter.report(EPOCH, None, "step-000000004")
    reporter.close()
    assert list(tmp_path.iterdir()) == []
    assert printed.getvalue() == ""


def test_it_asks_for_a_stop_once_it_was_interrupted(output: Output) -> None:
    assert not output.reporter.stop_requested()
    output.reporter.interrupted = True
    assert output.reporter.stop_requested()


def test_a_full_disk_costs_records_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    lines = JsonLines(Path("/dev/full"))
    lines.write(STEP)
    lines.write(STEP)
    lines.close()
    (record,) = caplog.records
    assert record.getMessage() == "/dev/full cannot be written (No space left on device): its records are lost"
