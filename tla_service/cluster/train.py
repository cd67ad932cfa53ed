"""The driver's side of a training run on Ray Train: starts the workers, passes their records on, fetches results."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Checkpoint, FailureConfig, Result, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from safetensors.torch import load_file
from torch import Tensor

from tla_service.cluster.mailbox import FailuresToMailbox, start_mailbox
from tla_service.cluster.session import Placement, own_dashboard
from tla_service.cluster.storage import RunFolder
from tla_service.cluster.worker import train_worker
from tla_service.config import RunConfig
from tla_service.errors import UnavailableError
from tla_service.files import whole_folder
from tla_service.runtime import COLLECTIVE_TIMEOUT_SECONDS
from tla_service.training.checkpoint import verify_checkpoint
from tla_service.training.output import FitResult
from tla_service.training.reporting import KEPT

Record = Mapping[str, Any]
FETCH_SECONDS = 0.2
# How often Ray Train's controller polls its workers. The default of 2 s delays the end of a small run.
POLL_SECONDS, FEW_WORKERS = "0.2", 8


@dataclass(frozen=True)
class TrainedRun:
    """Results of a training run.

    Attributes:
        result: Metrics and times.
        best_weights: State dict of the best weights on validation, on the CPU; empty if the run was interrupted first.
        checkpoint: Local copy of the newest checkpoint, with the last and the best weights.
    """

    result: FitResult
    best_weights: dict[str, Tensor]
    checkpoint: Path


def train_on_ray(
    config: RunConfig,
    placement: Placement,
    storage: str,
    copy_to: Path,
    follow: Callable[[Record], None],
    weights: Mapping[str, Tensor] | None = None,
    log_labels: Mapping[str, Any] | None = None,
) -> TrainedRun:
    """Run `fit_on_ray` and copy the newest checkpoint.

    Args:
        config: The run.
        placement: Workers and their resources.
        storage: Folder or s3:// prefix for checkpoints.
        copy_to: Local folder for the newest checkpoint; replaced.
        follow: Called in this thread with each record: `start`, `step`, `epoch`, `failure`.
        weights: State dict to start from.
        log_labels: Fields added to the workers' JSON log lines; None logs text.

    Raises:
        Exception: As `fit_on_ray`.
    """
    result, checkpoint = fit_on_ray(config, placement, storage, follow, weights, log_labels, with_rejector=True)
    with whole_folder(copy_to) as partial:
        checkpoint.to_directory(partial)
        verify_checkpoint(partial)
    best = copy_to / "best.safetensors"
    return TrainedRun(result, load_file(best) if best.exists() else {}, copy_to)


def fit_on_ray(
    config: RunConfig,
    placement: Placement,
    storage: str,
    follow: Callable[[Record], None],
    weights: Mapping[str, Tensor] | None = None,
    log_labels: Mapping[str, Any] | None = None,
    *,
    measure_test: bool = True,
    with_rejector: bool = False,
) -> tuple[FitResult, Checkpoint]:
    """Run `fit` on Ray Train workers, with restarts; a run of the same name and storage resumes.

    The first interrupt (Ctrl-C or SIGTERM) makes the workers save a checkpoint and stop; the second stops at once.

    Args:
        config: The run.
        placement: Workers and their resources.
        storage: Folder or s3:// prefix for checkpoints.
        follow: Called in this thread with each record: `start`, `step`, `epoch`, `failure`. An exception ends the run.
        weights: State dict to start from.
        log_labels: Fields added to the workers' JSON log lines; None logs text.
        measure_test: Evaluate the best weights on the test set.
        with_rejector: Fit the detector that is packaged with them.

    Returns:
        Metrics and times, and the newest checkpoint in the storage.

    Raises:
        UserError: Raised by a worker.
        NonFiniteLossError: Training diverged.
        RuntimeError: More failures than `scaling.max_failures`.
    """
    if placement.num_workers <= FEW_WORKERS:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    ENV_VARS_TO_PROPAGATE.add("RAY_API_SERVER_ADDRESS")  # the controller's environment has no public setting
    folder = RunFolder(storage, config.run_name)
    damage = folder.forget_record()
    if damage:
        follow({"event": "damaged_checkpoint", "message": damage})
    mailbox = start_mailbox()
    loop = {
        "config": config.model_dump(mode="json"),
        "folder": folder,
        "keep": KEPT,
        "mailbox": mailbox,
        "weights": ray.put(dict(weights)) if weights is not None else None,
        "log_labels": dict(log_labels) if log_labels is not None else None,
        "measure_test": measure_test,
        "with_rejector": with_rejector,
    }
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config=loop,
        # NCCL refuses two workers on one GPU; gloo does not.
        torch_config=TorchConfig(
            backend="gloo" if placement.use_gpu and placement.gpus_per_worker < 1 else None,
            timeout_s=COLLECTIVE_TIMEOUT_SECONDS,
        ),
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu=placement.use_gpu,
            resources_per_worker=placement.resources_per_worker,
        ),
        run_config=RayRunConfig(
            name=config.run_name,
            # Workers store checkpoints themselves: Ray Train would write marker files whenever workers start, and end
            # the run if the storage is unavailable at that moment.
            storage_path="ray",
            storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            callbacks=[FailuresToMailbox(mailbox)],  # type: ignore[list-item]
        ),
    )
    try:
        with own_dashboard():
            result = _follow(_in_background(trainer.fit), mailbox, follow, config.scaling.wait_seconds)
    except TrainingFailedError as error:
        cause = str(error).strip().splitlines()[-1]
        message = f"training failed more than scaling.max_failures={config.scaling.max_failures} times: {cause}"
        raise RuntimeError(message) from error
    returned: dict[str, Any] | None = result.return_value  # type: ignore[attr-defined]
    if returned is None or "error" in returned:
        raise RuntimeError("the workers ended without a result") if returned is None else returned["error"]
    return FitResult(**returned["result"]), folder.checkpoint(returned["checkpoint"])


def _in_background(call: Callable[[], Result]) -> "Future[Result]":
    """Run a call in a daemon thread; this thread handles records and signals."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised by `Future.result`
            future.set_exception(error)

    threading.Thread(target=work, name="ray-train", daemon=True).start()
    return future


def _follow(future: "Future[Result]", mailbox: Any, follow: Callable[[Record], None], wait_seconds: float) -> Result:
    """Pass records on until the run ends."""
    began, started = time.monotonic(), False
    with _stop_on_signal(mailbox):
        while True:
            done = future.done()
            records: list[Record] = ray.get(mailbox.fetch.remote())
            for record in records:
                started = started or record["event"] == "placed"
                follow(record)
            if done:
                return future.result()
            if not started and wait_seconds and time.monotonic() - began > wait_seconds:
                raise UnavailableError(
                    "scaling.wait_seconds",
                    wait_seconds,
                    "the cluster has not placed the workers in this time",
                    "ask for fewer workers, or wait longer",
                )
            time.sleep(FETCH_SECONDS)


@contextlib.contextmanager
def _stop_on_signal(mailbox: Any) -> Iterator[None]:
    """First SIGINT or SIGTERM: ask the workers to stop; second: KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        os.write(2, b"stopping after a checkpoint; interrupt again to stop at once\n")
        mailbox.stop.remote()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
