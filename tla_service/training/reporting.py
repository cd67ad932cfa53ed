"""Progress of a run: the Reporter protocol, the terminal, JSON lines, and a reporter for one machine."""

import contextlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tla_service.errors import without_credentials
from tla_service.files import remove_parts, write_whole
from tla_service.job import json_line
from tla_service.training.checkpoint import MANIFEST, LocalCheckpoint, Stored

LOG = "log.jsonl"
LATEST = "latest"  # names the newest checkpoint, to notice when it is gone
# The newest checkpoint is enough, since it holds the best weights too; one more in case it is damaged.
KEPT = 2
_log = logging.getLogger(__name__)
WARNINGS = ("failure", "damaged_checkpoint", "warning", "waiting", "hang")


class Reporter(Protocol):
    """What a run needs of its surroundings."""

    def progress(self, record: Mapping[str, Any]) -> None:
        """Take a record; called on rank 0 only, must not wait."""

    def stored(self) -> Sequence[Stored]:
        """Checkpoints that the run may resume from, newest first; called on rank 0 only."""

    def destination(self, name: str) -> Path:
        """Where to write a checkpoint; called on rank 0 only."""

    def report(self, metrics: dict[str, float] | None, checkpoint: Path | None, name: str) -> None:
        """Take an epoch's metrics, a checkpoint (written to `destination` by rank 0), or both; called on every rank.

        Metrics and the checkpoint's name are the same on every rank; None and empty if there are none.
        """

    def save_requested(self) -> bool:
        """Whether to save a checkpoint now; called on every rank at the same steps."""

    def stop_requested(self) -> bool:
        """Whether to stop: the run then saves a checkpoint and ends."""


class JsonLines:
    """Appends records with their time to a file, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._is_broken = path.open("a", buffering=1), False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; a full disk costs records, not the run."""
        try:
            self._file.write(without_credentials(json.dumps({"time": round(time.time(), 3), **record})) + "\n")
        except OSError as error:
            if not self._is_broken:
                _log.warning("%s cannot be written (%s): its records are lost", self._file.name, error.strerror)
            self._is_broken = True

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of a line that could not be written
            self._file.close()


class Terminal:
    """Progress for people: a bar on a terminal, plain lines elsewhere."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line, without credentials in URLs."""
        self._console.print(without_credentials(text), markup=False)

    def seldom(self, text: str) -> None:
        """Print a line, unless one was printed in the last `SECONDS_BETWEEN_LINES`."""
        if time.monotonic() - self._last_line >= self.SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(text)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a record of a run."""
        if record["event"] == "step":
            self._show_step(record)
        elif record["event"] in ("epoch", "validation"):
            self.say(epoch_line(record["metrics"]))
        else:
            warning = "warning: " if record["event"] in WARNINGS else ""
            self.say(f"{warning}{record.get('message', record['event'])}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_step(self, record: Mapping[str, Any]) -> None:
        if not self._console.is_terminal:
            minutes, seconds = divmod(int(record["seconds_left"]), 60)
            left = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
            done = f"epoch {record['epoch']:>3}  step {record['step']}/{record['total_steps']}"
            speed = f"{record['images_per_second']:.0f} images/s  {left} left"
            self.seldom(f"{done}  loss {record['loss']:.4f}  {speed}")
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("")
            self._bar.start()
        text = f"epoch {record['epoch']}  loss {record['loss']:.4f}  {record['images_per_second']:.0f} images/s"
        task = self._bar.task_ids[0]
        self._bar.update(task, description=text, completed=record["step"], total=record["total_steps"])


class JsonTerminal(Terminal):
    """Progress for machines: every record and message as a JSON line, with the labels that the mapping has then."""

    def __init__(self, labels: Mapping[str, Any], stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._labels, self._stream = labels, stream or sys.stdout

    def say(self, text: str) -> None:
        """Write a line with a message; an empty one, which only separates, is left out."""
        if text:
            self.show({"message": text})

    def show(self, record: Mapping[str, Any]) -> None:
        """Write a record."""
        level = "warning" if record.get("event") in WARNINGS else "info"
        self._stream.write(json_line(level, {**self._labels, **record}) + "\n")
        self._stream.flush()


def epoch_line(metrics: Mapping[str, float]) -> str:
    """One line for an epoch: what was trained, what was validated, or both."""
    line = f"epoch {metrics['epoch']:>3.0f}"
    if "train/loss" in metrics:
        line += f"  step {metrics['step']:.0f}  loss {metrics['train/loss']:.4f}"
    if metrics.get("train/triplet"):
        line += f"  triplet {metrics['train/triplet']:.4f}"
    if "validation/robust_accuracy" in metrics:
        clean, robust = metrics["validation/clean_accuracy"], metrics["validation/robust_accuracy"]
        line += f"  validation clean {clean:.1%} robust {robust:.1%}"
    return line + (f"  {metrics['images_per_second']:.0f} images/s" if "images_per_second" in metrics else "")


class LocalReporter:
    """Reports to the terminal and, on rank 0, a folder: for a plain process, or torchrun on one machine."""

    def __init__(self, output: Path, *, is_main: bool = True, terminal: Terminal | None = None) -> None:
        self.checkpoints = output / "checkpoints"
        self.interrupted = False
        self._terminal = terminal or Terminal()
        self._log = JsonLines(output / LOG) if is_main else None
        self._kept: list[str] = []  # names of the checkpoints written here, and of the one resumed from

    def progress(self, record: Mapping[str, Any]) -> None:
        """Show and log the record."""
        if record.get("resumed_from"):
            self._kept = [Path(record["resumed_from"]).name]
        if self._log is not None:
            self._log.write({name: value for name, value in record.items() if name != "history"})
            self._terminal.show(record)

    def stored(self) -> list[LocalCheckpoint]:
        """The checkpoints in the folder, newest first; and the last one written here, even if it is gone."""
        remove_parts(self.checkpoints)
        paths = {*self.checkpoints.glob("step-*")}
        with contextlib.suppress(FileNotFoundError):
            paths.add(self.checkpoints / (self.checkpoints / LATEST).read_text(errors="replace"))
        return [LocalCheckpoint(str(path)) for path in sorted(paths, reverse=True)]

    def destination(self, name: str) -> Path:
        """Its final path: it is written whole or not at all."""
        return self.checkpoints / name

    def report(self, metrics: dict[str, float] | None, checkpoint: Path | None, name: str) -> None:
        """Show and log the epoch; keep the last `KEPT` checkpoints that are known to be intact."""
        if metrics is not None:
            self.progress({"event": "epoch", "metrics": metrics})
        if checkpoint is None:
            return
        self._kept = [*(kept for kept in self._kept if kept != name), name][-KEPT:]
        if self._log is not None:
            with contextlib.suppress(OSError):  # no harm: the last name written stays, and a newer one counts more
                write_whole(self.checkpoints / LATEST, name)
        for path in self.checkpoints.glob("step-*"):
            if len(self._kept) == KEPT and path.name not in self._kept:
                shutil.rmtree(path, ignore_errors=True)

    def save_requested(self) -> bool:
        """Never: nobody announces the end of this machine."""
        return False

    def stop_requested(self) -> bool:
        """Whether `interrupted` was set, by a signal handler for example."""
        return self.interrupted

    def close(self) -> None:
        """Remove the progress bar and close the log."""
        self._terminal.close()
        if self._log is not None:
            self._log.close()

    def latest(self) -> Path | None:
        """The newest complete checkpoint, if any."""
        return max((path.parent for path in self.checkpoints.glob(f"step-*/{MANIFEST}")), default=None)
