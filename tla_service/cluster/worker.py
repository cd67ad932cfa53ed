"""What runs in a Ray Train worker."""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint

from tla_service.cluster.storage import RunFolder
from tla_service.config import RunConfig
from tla_service.errors import UserError
from tla_service.job import log_as_json
from tla_service.runtime import WorkerContext
from tla_service.training.fit import Run
from tla_service.training.meter import NonFiniteLossError


def train_worker(loop: dict[str, Any]) -> dict[str, Any]:
    """One worker of a run.

    Args:
        loop: `config` (the run as plain values), `folder` (its RunFolder), `keep` (number of checkpoints kept),
            `mailbox`, `weights` (object reference to a state dict, or None), `log_labels` (fields of JSON log lines;
            None logs text), `measure_test` and `with_rejector` (for `Run.train`).

    Returns:
        `result`, the fields of a FitResult, and `checkpoint`, the name of the newest; or `error`, which a restart would
        not mend: raised, it would make Ray Train restart the workers.
    """
    config = RunConfig.model_validate(loop["config"])
    ray_context = ray.train.get_context()
    if loop["log_labels"] is not None:
        log_as_json({**loop["log_labels"], "rank": ray_context.get_world_rank()})
    context = WorkerContext(
        rank=ray_context.get_world_rank(),
        local_rank=ray_context.get_local_rank(),
        world_size=ray_context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    if context.device.type == "cuda":
        # Every worker of a node sees all its GPUs; NCCL's object collectives use the current one.
        torch.cuda.set_device(context.device)
    weights = ray.get(loop["weights"]) if loop["weights"] is not None else None
    ends = {name: loop[name] for name in ("measure_test", "with_rejector")}
    reporter = RayReporter(loop["mailbox"], loop["folder"], loop["keep"], is_main=context.is_main)
    if context.is_main:
        logging.getLogger("tla_service").addHandler(WarningsToMailbox(loop["mailbox"]))
        reporter.progress({"event": "placed"})
    try:
        run = Run(config, context, reporter)
        run.start(weights)
        result = run.train(**ends)
    except (UserError, NonFiniteLossError) as error:
        return {"error": error}
    finally:
        # Calls are ordered: once this one is answered, all records have arrived.
        ray.get(loop["mailbox"].stop_asked.remote())
    return {"result": vars(result), "checkpoint": reporter.newest}


class RayReporter:
    """Stores checkpoints and reports to the driver's mailbox.

    Not through `ray.train.report`: Ray Train's controller ends the run when it cannot write its own record of a
    checkpoint, and takes one report per poll.

    Args:
        mailbox: The driver's mailbox.
        folder: The run's folder in the storage.
        keep: Number of checkpoints kept.
        is_main: Whether this is rank 0.
    """

    def __init__(self, mailbox: Any, folder: RunFolder, keep: int, *, is_main: bool) -> None:
        self._mailbox, self._folder, self._keep = mailbox, folder, keep
        self._is_main = is_main
        self._kept: list[str] = []  # checkpoints stored by this process, and the one resumed from
        self._answer: Any = None
        self._stop = False

    @property
    def newest(self) -> str:
        """On rank 0, name of the newest complete checkpoint; empty if there is none."""
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
        return Path(tempfile.mkdtemp(prefix="tla-checkpoint-"), name)

    def report(self, metrics: dict[str, float] | None, checkpoint: Path | None, name: str) -> None:
        """Store the checkpoint, retrying while the storage is unavailable; then report the epoch.

        Raises:
            UnavailableError: The storage cannot be written.
        """
        if checkpoint is not None:
            # A repeated epoch writes to the same name, so an interrupted upload leaves no orphan.
            self._folder.save(checkpoint, name)
            shutil.rmtree(checkpoint.parent)
            self._kept = [*(kept for kept in self._kept if kept != name), name][-self._keep :]
            if len(self._kept) == self._keep:
                self._folder.keep(self._kept)
        if self._is_main and metrics is not None:
            self.progress({"event": "epoch", "metrics": metrics, "checkpoint": checkpoint is not None})

    def stop_requested(self) -> bool:
        """Whether the driver has asked to stop, by the answer to the previous question, without waiting."""
        self._read_answer()
        if self._is_main and self._answer is None:
            self._answer = self._mailbox.stop_asked.remote()
        return self._stop

    def _read_answer(self) -> None:
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if ready:
                self._stop = self._stop or ray.get(self._answer)
                self._answer = None


class WarningsToMailbox(logging.Handler):
    """Sends warnings of this process to the driver."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__(logging.WARNING)
        self._mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one on."""
        self._mailbox.push.remote({"event": "warning", "message": record.getMessage()})
