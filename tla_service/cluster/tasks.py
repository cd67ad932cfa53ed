"""Shards of an evaluation as remote tasks on Ray."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError, WorkerCrashedError
from torch import Tensor, nn

from tla_service.config import ScalingConfig
from tla_service.errors import UnavailableError
from tla_service.evaluation.outcomes import Arrays, IntArray
from tla_service.evaluation.shards import Measurement, Shard
from tla_service.report.tasks import Inputs, MissingShard
from tla_service.runtime import keep_freed_memory

_AHEAD = 2  # shards in flight per worker: one measured, one waiting; more would only hold images in memory


class Workers:
    """Measures shards on the cluster that this process has joined, as many at a time as it has room for.

    Images of the shards in flight are in memory, not the whole set.

    Args:
        scaling: What a shard reserves, and how often one whose worker dies is given to another.

    Raises:
        UnavailableError: No node has room for one; the message shows the arithmetic.
    """

    def __init__(self, scaling: ScalingConfig) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        use_gpu = any(node.get("GPU", 0) for node in nodes) if scaling.use_gpu == "auto" else scaling.use_gpu
        share = {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if use_gpu else {})
        room = sum(int(min(node.get(name, 0.0) / need for name, need in share.items())) for node in nodes)
        if room == 0:
            needs = " and ".join(f"{need:g} {name}s" for name, need in share.items())
            have = ", ".join(f"{max((node.get(name, 0.0) for node in nodes), default=0):g} {name}s" for name in share)
            reason = f"a worker needs {needs}; the largest node has {have}"
            raise UnavailableError("scaling", None, reason, "ask for less, or join a larger cluster")
        self._count = min(scaling.num_workers, room) if isinstance(scaling.num_workers, int) else room
        self._cpus, self._gpus, self._retries = share["CPU"], share.get("GPU", 0.0), scaling.max_failures

    def __str__(self) -> str:
        each = f"{self._gpus:g} GPU" if self._gpus else f"{self._cpus:g} CPU core" + ("s" if self._cpus != 1 else "")
        return f"{self._count} worker{'s' if self._count != 1 else ''}, {each} each"

    def __call__(self, shards: Sequence[MissingShard], inputs: Inputs) -> Iterator[tuple[MissingShard, Arrays]]:
        """See :class:`tla_service.report.tasks.Measurer`.

        Raises:
            UserError: What a measurement raised.
            UnavailableError: A shard's worker died more often than allowed.
        """
        networks = {model: ray.put(network) for model, network in inputs.networks.items()}
        surrogate = ray.put(inputs.surrogate)
        measure = ray.remote(_measure).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=self._retries, retry_exceptions=False
        )
        waiting = list(reversed(shards))
        running: dict[Any, MissingShard] = {}
        while waiting or running:
            while waiting and len(running) < _AHEAD * self._count:
                shard = waiting.pop()
                task = shard.task
                reference = measure.remote(
                    task.measurement, networks[task.model], surrogate, *inputs.images(shard), shard.rows
                )
                running[reference] = shard
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                shard = running.pop(reference)
                yield shard, _result(reference, shard.name)


def _result(reference: Any, name: str) -> Arrays:
    try:
        arrays: Arrays = ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error  # what the measurement itself raised
    except WorkerCrashedError as error:
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
    """One shard, in a worker."""
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        keep_freed_memory()
    other = surrogate.to(device) if surrogate is not None else None
    # Arrays that Ray hands out are read-only, which torch warns of.
    shard = Shard(network.to(device), other, images.clone(), labels.clone(), rows.copy(), device)
    return measurement.run(shard)
