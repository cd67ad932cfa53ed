"""A worker's way to the driver and the storage: records, checkpoints, warnings."""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint

from tla_service.cluster.storage import RunFolder
from tla_service.errors import UnavailableError
from tla_service.training.reporting import KEPT


class RayReporter:
    """Stores checkpoints, of which the last `KEPT` stay, and on rank 0 (`is_main`) reports to the driver's mailbox.

    `watched`: Ray announces the end of nodes.

    Not through `ray.train.report`: Ray Train's controller ends the run when it cannot write its own record of a
    checkpoint, and takes one report per poll.
    """

    def __init__(self, mailbox: Any, folder: RunFolder, *, is_main: bool, watched: bool = False) -> None:
        self._mailbox, self._folder, self._is_main, self._watched = mailbox, folder, is_main, watched
        self._kept: list[str] = []  # checkpoints stored by this process, and the one resumed from
        self._answer: Any = None
        self._stop = self._save = False
        self._leaving: set[str] = set()  # nodes whose end Ray has announced
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None
        self._copies = f"tla-checkpoint-{sha256(folder.uri.encode()).hexdigest()[:16]}-"
        if is_main:  # what a worker of this run left that was killed in an upload
            for left in Path(tempfile.gettempdir()).glob(f"{self._copies}*"):
                shutil.rmtree(left, ignore_errors=True)

    def finish(self) -> str:
        """Wait until all checkpoints are stored; returns the name of the newest on rank 0, "" if there is none.

        Raises UnavailableError if the storage was unavailable for too long.
        """
        if self._upload is not None:
            self._upload.result()
        return self._kept[-1] if self._kept else ""

    def stored(self) -> Sequence[Checkpoint]:
        """Checkpoints in the storage, newest first."""
        return self._folder.checkpoints()

    def progress(self, record: Mapping[str, Any]) -> None:
        """Send a record without waiting; the answer to the previous one tells whether to stop."""
        self._read_answer()
        if record.get("resumed_from"):
            self._kept = [Path(record["resumed_from"]).name]
        self._answer = self._mailbox.push.remote(record)

    def destination(self, name: str) -> Path:
        """A temporary folder, which `report` stores."""
        return Path(tempfile.mkdtemp(prefix=self._copies), name)

    def report(self, metrics: dict[str, float] | None, checkpoint: Path | None, name: str) -> None:
        """Store the checkpoint in the background, after the one before; then report the epoch.

        Raises UnavailableError if the checkpoint before could not be stored.
        """
        if checkpoint is not None:
            try:
                self.finish()
            except UnavailableError:
                shutil.rmtree(checkpoint.parent)
                raise
            asked, self._save = self._save, False
            self._upload = self._uploads.submit(self._store, checkpoint, name, asked=asked)
        if self._is_main and metrics is not None:
            self.progress({"event": "epoch", "metrics": metrics, "checkpoint": checkpoint is not None})

    def _store(self, checkpoint: Path, name: str, *, asked: bool) -> None:
        # A repeated epoch writes to the same name, so an interrupted upload leaves no orphan.
        try:
            self._folder.save(checkpoint, name)
        finally:
            shutil.rmtree(checkpoint.parent)
        if asked:
            self._mailbox.save.remote(done=True)
        self._kept = [*(kept for kept in self._kept if kept != name), name][-KEPT:]
        if len(self._kept) == KEPT:
            self._folder.keep(self._kept)

    def save_requested(self) -> bool:
        """Whether Ray has announced the end of a node, or (on rank 0) a resize; waits for the other workers' calls."""
        self._read_answer()
        if not self._watched:
            return self._save
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids if info is not None else ()) - self._leaving
        if new and self._is_main:
            self.progress({"event": "warning", "message": f"nodes are about to go away: {', '.join(sorted(new))}"})
        self._leaving |= new
        return bool(new) or self._save

    def stop_requested(self) -> bool:
        """Whether the driver has asked to stop, by the answer to the previous question, without waiting."""
        self._read_answer()
        if self._is_main and self._answer is None:
            self._answer = self._mailbox.asked.remote()
        return self._stop

    def _read_answer(self) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            asked = ray.get(self._answer)
            self._stop, self._save = self._stop or asked == "stop", asked == "save"
            self._answer = None


class WarningsToMailbox(logging.Handler):
    """Sends warnings of this process to the driver."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__(logging.WARNING)
        self._mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one on."""
        self._mailbox.push.remote({"event": "warning", "message": record.getMessage()})
