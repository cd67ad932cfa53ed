"""What runs in a Ray Train worker, and in the controller beside it."""

import contextlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pyarrow.fs import FileSelector
from ray.train import Checkpoint, UserCallback

from tla_service.cluster.storage import RunFolder
from tla_service.config import RunConfig
from tla_service.errors import UserError
from tla_service.logs import log_as_json
from tla_service.runtime import WorkerContext
from tla_service.training.fit import fit
from tla_service.training.meter import NonFiniteLossError


def train_worker(loop: dict[str, Any]) -> dict[str, Any]:
    """One worker of a run.

    Args:
        loop: `config` (the run as plain values), `storage`, `mailbox`, `weights` (an object reference to a state dict,
            or None), `log_labels` (fields of JSON log lines; None: log as text), `measure_test` and `with_rejector`
            (what `fit` is to do at the end).

    Returns:
        `result`, a FitResult's fields, and `checkpoint`, the name of the newest one; or `error`, when the run ended for
        a reason that a restart would not change: raising it would make Ray try again.
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
        # Ray shows a node's GPUs to all its workers; NCCL's object collectives go by the current one.
        torch.cuda.set_device(context.device)
    weights = ray.get(loop["weights"]) if loop["weights"] is not None else None
    ends = {name: loop[name] for name in ("measure_test", "with_rejector")}
    try:
        folder = RunFolder(loop["storage"], config.run_name)
        reporter = RayReporter(loop["mailbox"], folder, is_main=context.is_main)
        if context.is_main:
            reporter.progress({"event": "placed"})
        result = fit(config, context, reporter, initial_weights=weights, **ends)
    except (UserError, NonFiniteLossError) as error:
        return {"error": error}
    return {"result": result.as_dict(), "checkpoint": reporter.newest}


class RayReporter:
    """Reports to Ray Train (epochs and checkpoints) and to the driver's mailbox (progress in between).

    Args:
        mailbox: The driver's.
        folder: The run's folder in the storage.
        is_main: Whether this is rank 0.

    Attributes:
        newest: On rank 0, name of the newest checkpoint that is known to be whole.
    """

    def __init__(self, mailbox: Any, folder: RunFolder, *, is_main: bool) -> None:
        self._mailbox = mailbox
        self._folder = folder
        self._is_main = is_main
        self._answer: Any = None
        self._stop = False
        self.newest = ""

    def stored(self) -> Sequence[Checkpoint]:
        """What is in the storage, and not what Ray has recorded: that may be behind, or name what is gone."""
        return self._folder.checkpoints()

    def progress(self, record: Mapping[str, Any]) -> None:
        """Send the record without waiting; the answer to the one before says whether to stop."""
        self._read_answer()
        self.newest = Path(record.get("resumed_from", "")).name or self.newest
        self._answer = self._mailbox.push.remote(record)

    def destination(self, name: str) -> Path:
        """A temporary folder: Ray uploads it."""
        return Path(tempfile.mkdtemp(prefix="tla-checkpoint-"), name)

    def report(self, metrics: dict[str, float] | None, checkpoint: Path | None, name: str) -> None:
        """Hand metrics and checkpoint to Ray; it uploads before this returns, and commits at its next poll.

        An epoch without a checkpoint goes to the mailbox instead: Ray takes one report a poll, and all workers would
        wait for it.
        """
        if not name:
            if self._is_main:
                self.progress({"event": "epoch", "metrics": metrics})
        elif checkpoint is None:
            ray.train.report(metrics or {})
        else:
            # A replayed epoch writes to the same name, so an upload that was never committed leaves no orphan.
            ray.train.report(metrics or {}, checkpoint=Checkpoint.from_directory(checkpoint), checkpoint_dir_name=name)
            shutil.rmtree(checkpoint.parent)
            self.newest = name

    def stop_requested(self) -> bool:
        """Whether the driver has asked for a stop: the answer to the question before this one, without waiting."""
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


class EpochsToMailbox(UserCallback):
    """Passes each epoch that all workers have reported to the driver, and each failure; runs in Ray's controller.

    Args:
        mailbox: The driver's.
        keep: How many checkpoints stay.
    """

    def __init__(self, mailbox: Any, keep: int) -> None:
        self._mailbox, self._keep = mailbox, keep
        self._kept: list[str] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Pass on rank 0's metrics, which are sums over all workers; keep the last checkpoints.

        Ray would keep as many of its record, which knows nothing of those from before a restart.
        """
        if metrics[0]:  # empty with a checkpoint in the middle of an epoch
            self._mailbox.push.remote({"event": "epoch", "metrics": metrics[0], "checkpoint": checkpoint is not None})
        if checkpoint is None:
            return
        folder, _, name = checkpoint.path.rpartition("/")
        self._kept = [*(kept for kept in self._kept if kept != name), name][-self._keep :]
        if len(self._kept) == self._keep:
            files: Any = checkpoint.filesystem
            with contextlib.suppress(OSError):
                for info in files.get_file_info(FileSelector(folder)):
                    if info.base_name.startswith("step-") and info.base_name not in self._kept:
                        files.delete_dir(info.path)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Pass on what went wrong; Ray restarts the workers by itself."""
        reasons = {rank: str(error).strip().splitlines()[-1] for rank, error in worker_exceptions.items()}
        self._mailbox.push.remote({"event": "failure", "message": f"workers failed: {reasons}"})
