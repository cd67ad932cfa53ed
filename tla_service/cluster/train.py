"""A training run on Ray Train: the driver starts workers, passes their records on and fetches results."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray._private.services import get_webui_url_from_internal_kv
from ray.train import Checkpoint, FailureConfig, Result, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from torch import Tensor

from tla_service.cluster.elastic import Resizes
from tla_service.cluster.mailbox import FailuresToMailbox, reason_line, start_mailbox
from tla_service.cluster.placement import Placement, waiting
from tla_service.cluster.reporter import RayReporter, WarningsToMailbox
from tla_service.cluster.session import own_dashboard
from tla_service.cluster.storage import RunFolder, in_background
from tla_service.cluster.validation import RayValidator
from tla_service.config import RunConfig
from tla_service.errors import OutOfMemoryError, UnavailableError, UserError
from tla_service.files import whole_folder
from tla_service.job import log_as_json, stop_on_signal
from tla_service.runtime import WorkerContext, collective_timeout, failing_together
from tla_service.training.checkpoint import verify_checkpoint
from tla_service.training.fit import Run
from tla_service.training.meter import NonFiniteLossError, memory_remedy
from tla_service.training.output import FitResult
from tla_service.training.watch import START_SECONDS, watched

Record = Mapping[str, Any]
FETCH_SECONDS = 0.2
TELL_SECONDS = 30
ALONE_SECONDS = 15  # within which the other workers end, too, with an error that they share
WAIT_SECONDS, WAIT_AGAIN_SECONDS = 60, 600  # after which the log says what the run waits for, and says it again
# How often Ray Train's controller polls its workers. The default of 2 s delays the end of a small run.
POLL_SECONDS, FEW_WORKERS = "0.2", 8


class _Trainer(TorchTrainer):
    """Ray's, without processes that take seconds of each start for nothing.

    They are Ray Data's, and on a cluster without a dashboard the cleaner of placement groups, which asks it who lives.
    """

    def _create_default_callbacks(self) -> list[Any]:
        useless: tuple[type, ...] = (DatasetsCallback,)
        if not get_webui_url_from_internal_kv():
            useless = (DatasetsCallback, PlacementGroupCleanerCallback)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [each for each in callbacks if not isinstance(each, useless)]


def trainer_of(
    work: Callable[[dict[str, Any]], Any],
    loop: dict[str, Any],
    placement: Placement,
    timeout_seconds: int,
    *,
    num_workers: int | tuple[int, int],
    **run_config: Any,
) -> TorchTrainer:
    """Ray's trainer of workers that call `work(loop)`, to be fitted within `own_dashboard`.

    `timeout_seconds` is that of collectives; `run_config` are further fields of Ray Train's.
    """
    ENV_VARS_TO_PROPAGATE.add("RAY_API_SERVER_ADDRESS")  # the controller's environment has no public setting
    # NCCL refuses two workers on one GPU; gloo does not.
    backend = "gloo" if placement.use_gpu and placement.gpus_per_worker < 1 else None
    return _Trainer(
        work,
        train_loop_config=loop,
        torch_config=TorchConfig(backend=backend, timeout_s=timeout_seconds),
        scaling_config=ScalingConfig(
            num_workers=num_workers,  # type: ignore[arg-type]
            use_gpu=placement.use_gpu,
            resources_per_worker=placement.resources_per_worker,
        ),
        # Workers store checkpoints themselves: Ray Train would write marker files whenever workers start, and end the
        # run if the storage is unavailable at that moment.
        run_config=RayRunConfig(
            storage_path="ray", storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())), **run_config
        ),
    )


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
    code: bytes | None = None,
) -> tuple[FitResult, Checkpoint]:
    """Train on Ray Train workers, with restarts; a run of the same name and storage resumes.

    The first interrupt (Ctrl-C or SIGTERM) makes the workers save a checkpoint and stop; the second stops at once.
    `storage` (a folder or s3:// prefix) keeps the checkpoints; `follow` is called in this thread with each record, and
    an exception of it ends the run. Training starts from `weights`; `code` is that of a network from outside this
    package; `log_labels` turn the workers' log to JSON lines.

    Returns metrics and times, and the newest checkpoint in the storage. Raises a worker's UserError, NonFiniteLossError
    if training diverged, or RuntimeError after more failures than `scaling.max_failures`.
    """
    most = config.scaling.bounds(auto=placement.num_workers)[1]
    if most <= FEW_WORKERS:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    workers, max_failures = config.scaling.num_workers, config.scaling.max_failures
    elastic = isinstance(workers, tuple)
    if elastic:
        # Ray looks at the nodes every 20 s: after the loss of one, the first attempt may still ask for as many workers.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    timeout = collective_timeout(config.scaling.hang_seconds)
    if most > 1:  # else Ray's check of a worker's health may come before `watched`, which says more
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(timeout))
        os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(timeout))
    folder = RunFolder(storage, config.run_name)
    damage = folder.check_record()
    if damage:
        follow({"event": "damaged_checkpoint", "message": damage})
    mailbox = start_mailbox()
    loop = {
        "config": config.model_dump(mode="json"),
        "folder": folder,
        "token": folder.mark(),
        "watched": os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0",
        "mailbox": mailbox,
        "weights": ray.put(None if weights is None else dict(weights)),
        # As one archive, not by Ray's runtime environment: that would start processes anew, put the folder on every
        # process's path, and conflict with the environment of `ray job submit`. Checkpoints have the archive too.
        "code": ray.put(code),
        "log_labels": log_labels,
        "measure_test": measure_test,
        "with_rejector": with_rejector,
    }
    callbacks: list[Any] = [FailuresToMailbox(mailbox, memory_remedy(config, most))]
    if elastic:
        callbacks.append(Resizes(mailbox, max_failures))
    failures = FailureConfig(max_failures=-1 if elastic else max_failures)
    run_config = {"name": config.run_name, "failure_config": failures, "callbacks": callbacks}
    number = workers if isinstance(workers, tuple) else placement.num_workers
    trainer = trainer_of(train_worker, loop, placement, timeout, num_workers=number, **run_config)
    try:
        with own_dashboard():
            # This thread handles records and signals.
            result = _follow(in_background(trainer.fit), mailbox, follow, config.scaling.wait_seconds, placement)
    except TrainingFailedError as error:
        what = "Ray Train failed"
        if elastic or isinstance(error, WorkerGroupError):
            what = f"training failed more than scaling.max_failures={max_failures} times"
        raise RuntimeError(f"{what}: {reason_line(error)}") from error
    returned: dict[str, Any] | None = result.return_value  # type: ignore[attr-defined]
    if returned is None or "error" in returned:
        raise RuntimeError("the workers ended without a result") if returned is None else returned["error"]
    return FitResult(**returned["result"]), folder.checkpoint(returned["checkpoint"])


def fetch_checkpoint(stored: Checkpoint, folder: Path) -> None:
    """Copy a checkpoint from the storage to a local folder, which is replaced, and check that it is complete."""
    with whole_folder(folder) as part:
        stored.to_directory(part)
        verify_checkpoint(part)


def _follow(
    future: "Future[Result]", mailbox: Any, follow: Callable[[Record], None], wait_seconds: float, placement: Placement
) -> Result:
    """Pass records on until the run ends; say so where workers wait to be placed."""
    began, started, has_stepped, is_hung, failure = time.monotonic(), False, False, False, ""
    waits_since: float | None = time.time()
    tell_at = time.time() + WAIT_SECONDS
    with stop_on_signal("stopping after a checkpoint", mailbox.stop.remote):
        while True:
            done = future.done()
            records: list[dict[str, Any]] = ray.get(mailbox.fetch.remote())
            for record in records:
                event, lacks_memory = record["event"], record.pop("lacks_memory", None)
                fatal = record.pop("fatal", None)
                if event == "placed":
                    started, has_stepped, is_hung, waits_since = True, False, False, None
                elif event == "failure":
                    told = "workers failed: they ended because one of them hung" if is_hung else record["message"]
                    if waits_since is not None and told == failure:
                        continue  # Ray tells of a worker on a node that is drained until all others have ended
                    record["message"] = failure = told
                    waits_since, tell_at = time.time(), time.time() + WAIT_SECONDS
                has_stepped, is_hung = has_stepped or event in ("step", "epoch"), is_hung or event == "hang"
                follow(record)
                fatal = fatal or (None if has_stepped else lacks_memory)
                if fatal is not None:
                    raise fatal  # a restart would end the same
            if done:
                return future.result()
            if waits_since is not None and time.time() > tell_at:
                follow({"event": "waiting", "message": waiting(placement, waits_since)})
                tell_at = time.time() + WAIT_AGAIN_SECONDS
            if not started and wait_seconds and time.monotonic() - began > wait_seconds:
                reason = "the cluster has not placed the workers in this time"
                remedy = "ask for fewer workers, or wait longer"
                raise UnavailableError("scaling.wait_seconds", wait_seconds, reason, remedy)
            time.sleep(FETCH_SECONDS)


def train_worker(loop: dict[str, Any]) -> dict[str, Any]:
    """One worker of a run: returns the fields of a FitResult and the name of the newest checkpoint, or an error.

    An error is returned if a restart would not mend it: raised, it would make Ray Train restart the workers.
    """
    config = RunConfig.model_validate(loop["config"])
    ray_context = ray.train.get_context()
    if loop["log_labels"] is not None:
        log_as_json({**loop["log_labels"], "rank": ray_context.get_world_rank()})
    context = WorkerContext(
        rank=ray_context.get_world_rank(),
        world_size=ray_context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    if context.device.type == "cuda":
        # Every worker of a node sees all its GPUs; NCCL's object collectives use the current one.
        torch.cuda.set_device(context.device)
    weights, code = ray.get([loop["weights"], loop["code"]])
    reporter = RayReporter(loop["mailbox"], loop["folder"], is_main=context.is_main, watched=loop["watched"])
    if context.is_main:
        logging.getLogger("tla_service").addHandler(WarningsToMailbox(loop["mailbox"]))
        reporter.progress({"event": "placed"})

    def tell(message: str) -> None:
        ray.get(loop["mailbox"].push.remote({"event": "hang", "message": message}), timeout=TELL_SECONDS)

    try:
        validator = None
        if config.scaling.async_validation:
            use_gpu = context.device.type == "cuda"
            validator = RayValidator(config, loop["code"], context.world_size, use_gpu=use_gpu)
        with watched(context, max(START_SECONDS, config.scaling.hang_seconds), tell):
            with failing_together(context):
                loop["folder"].check_shared(loop["token"])
            run = Run(config, context, reporter, code, validator)
            run.start(weights)
        with watched(context, config.scaling.hang_seconds, tell):
            result = run.train(measure_test=loop["measure_test"], with_rejector=loop["with_rejector"])
        newest = reporter.finish()
    except OutOfMemoryError:
        raise  # the other workers do not know of it, and are to be ended
    except (UserError, NonFiniteLossError) as error:
        in_background(partial(_tell_alone, loop["mailbox"], context.rank, error))
        return {"error": error}
    finally:
        # Calls are ordered: once this one is answered, all records have arrived.
        ray.get(loop["mailbox"].asked.remote())
    return {"result": vars(result), "checkpoint": newest}


def _tell_alone(mailbox: Any, rank: int, error: Exception) -> None:
    """End the run if the other workers do not: they wait for this one, and Ray for them."""
    time.sleep(ALONE_SECONDS)
    mailbox.push.remote({"event": "failure", "message": f"rank {rank} failed alone: {error}", "fatal": error})
