"""What runs in a Ray Train worker, and in the controller beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, UserCallback

from tla_service.config import RunConfig
from tla_service.errors import UserError
from tla_service.logs import log_as_json
from tla_service.runtime import WorkerContext
from tla_service.training.checkpoint import read_history
from tla_service.training.fit import fit
from tla_service.training.meter import NonFiniteLossError


def train_worker(loop: dict[str, Any]) -> dict[str, Any]:
    """One worker of a run.

    Args:
        loop: `config` (the run as plain values), `mailbox`, `weights` (an object reference to a state dict, or None),
            `log_labels` (fields of JSON log lines; None: log as text), `measure_test` and `with_rejector` (what `fit`
            is to do at the end).

    Returns:
        `result`, a FitResult's fields; or `error`, when the run ended for a reason that a restart would not change:
        raising it would make Ray try again.
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
    reporter = RayReporter(loop["mailbox"], is_main=context.is_main)
    weights = ray.get(loop["weights"]) if loop["weights"] is not None else None
    checkpoint = ray.train.get_checkpoint()
    ends = {name: loop[name] for name in ("measure_test", "with_rejector")}
    try:
        if checkpoint is None:
            reporter.start(context, None)
            result = fit(config, context, reporter, initial_weights=weights, **ends)
        else:
            with checkpoint.as_directory() as folder:
                reporter.start(context, Path(folder))
                result = fit(config, context, reporter, resume_from=Path(folder), **ends)
    except (UserError, NonFiniteLossError) as error:
        return {"error": error}
    return {"result": result.as_dict()}


class RayReporter:
    """Reports to Ray Train (epochs and checkpoints) and to the driver's mailbox (progress in between)."""

    def __init__(self, mailbox: Any, *, is_main: bool) -> None:
        self._mailbox = mailbox
        self._is_main = is_main
        self._answer: Any = None
        self._stop = False

    def start(self, context: WorkerContext, checkpoint: Path | None) -> None:
        """Tell that the workers are up, and what was done by the checkpoint they go on from.

        A driver that was killed may have missed epochs that its workers still did.
        """
        if self._is_main:
            history = read_history(checkpoint) if checkpoint is not None else []
            resumed = {"resumed": checkpoint is not None, "history": history}
            self.progress({"event": "start", "workers": context.world_size, **resumed})

    def progress(self, record: Mapping[str, Any]) -> None:
        """Send the record without waiting; the answer to the one before says whether to stop."""
        self._read_answer()
        self._answer = self._mailbox.push.remote(record)

    def report(self, metrics: dict[str, float], checkpoint: Path | None, name: str) -> None:
        """Hand metrics and checkpoint to Ray; it uploads before this returns, and commits at its next poll.

        An epoch without a checkpoint goes to the mailbox instead: Ray takes one report a poll, and all workers would
        wait for it.
        """
        if not name:
            if self._is_main:
                self.progress({"event": "epoch", "metrics": metrics})
        elif checkpoint is None:
            ray.train.report(metrics)
        else:
            # A replayed epoch writes to the same name, so an upload that was never committed leaves no orphan.
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(checkpoint), checkpoint_dir_name=name)

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
    """Passes each epoch that all workers have reported to the driver, and each failure; runs in Ray's controller."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Pass on rank 0's metrics: they are sums over all workers."""
        self._mailbox.push.remote({"event": "epoch", "metrics": metrics[0], "checkpoint": checkpoint is not None})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Pass on what went wrong; Ray restarts the workers by itself."""
        reasons = {rank: str(error).strip().splitlines()[-1] for rank, error in worker_exceptions.items()}
        self._mailbox.push.remote({"event": "failure", "message": f"workers failed: {reasons}"})
