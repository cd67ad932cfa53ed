"""Shards of an evaluation as remote tasks on Ray; see `tla_service.report.tasks.Measurer`."""

import functools
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError
from torch import Tensor, nn

from tla_service.cluster.placement import Placement, room, uses_gpu
from tla_service.config import ScalingConfig
from tla_service.errors import UnavailableError
from tla_service.evaluation.shards import Arrays, IntArray, Measurement, Shard
from tla_service.report.tasks import Inputs, MissingShard
from tla_service.runtime import keep_freed_memory

_AHEAD = 2  # shards in flight per worker: one measured, one waiting; more would only hold images in memory


class TimeIsUpError(Exception):
    """The deadline of a measurement has passed; shards that were saved are kept."""


class Workers:
    """Measures shards on the cluster that this process has joined, as many at a time as it has room for.

    Images of the shards in flight are in memory, not the whole set. A shard whose worker dies is given to another, up
    to `scaling.max_failures` times.
    """

    def __init__(self, scaling: ScalingConfig, deadline: float = math.inf) -> None:
        self._deadline = deadline  # by the monotonic clock
        placement = Placement(1, uses_gpu(scaling), scaling.cpus_per_worker, scaling.gpus_per_worker)
        fit, arithmetic = room(placement)
        if fit == 0:
            remedy = "ask for less, or join a larger cluster"
            raise UnavailableError("scaling", None, f"no worker can be placed: {arithmetic}", remedy)
        self._count = min(scaling.bounds(auto=fit)[1], fit)
        self._cpus, self._gpus = scaling.cpus_per_worker, placement.resources_per_worker.get("GPU", 0.0)
        self._retries = scaling.max_failures

    def check_time(self) -> None:
        """Raise TimeIsUpError once it is."""
        if time.monotonic() > self._deadline:
            raise TimeIsUpError

    def __str__(self) -> str:
        each = f"{self._gpus:g} GPU" if self._gpus else f"{self._cpus:g} CPU core" + ("s" if self._cpus != 1 else "")
        return f"{self._count} worker{'s' if self._count != 1 else ''}, {each} each"

    def __call__(self, waiting: deque[MissingShard], inputs: Inputs) -> Iterator[tuple[MissingShard, Arrays]]:
        """See `Measurer`; raises what a measurement raised."""
        put = functools.cache(ray.put)  # each network once
        measurements: dict[tuple[str, str], Any] = {}  # sent once per task: one may hold a detector
        measure = ray.remote(_measure).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=self._retries, retry_exceptions=False
        )
        running: dict[Any, MissingShard] = {}
        while waiting or running:
            while waiting and len(running) < _AHEAD * self._count:
                shard = waiting.popleft()
                networks = put(inputs.networks[shard.task.model]), put(shard.task.surrogate)
                if shard.task.key not in measurements:
                    measurements[shard.task.key] = ray.put(shard.task.measurement)
                images, labels = inputs.images(shard)
                running[measure.remote(measurements[shard.task.key], *networks, images, labels, shard.rows)] = shard
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                shard = running.pop(reference)
                yield shard, _result(reference, shard.name)
                self.check_time()


def _result(reference: Any, name: str) -> Arrays:
    try:
        arrays: Arrays = ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error  # what the measurement itself raised
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        remedy = "check for lack of memory; the same command resumes from the saved shards"
        raise UnavailableError("shard", name, "its worker died more often than scaling.max_failures", remedy) from error
    return arrays


def _measure(
    measurement: Measurement,
    network: nn.Module,
    surrogate: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    rows: IntArray,
) -> Arrays:
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        keep_freed_memory()
    other = surrogate.to(device) if surrogate is not None else None
    # Arrays that Ray hands out are read-only, which torch warns of.
    shard = Shard(network.to(device), other, images.clone(), labels.clone(), rows.copy(), device)
    return measurement.run(shard)
