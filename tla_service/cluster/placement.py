"""What fits on the cluster that this process has joined: a run, or the trials of a sweep."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from tla_service.config import RunConfig, ScalingConfig
from tla_service.errors import UnavailableError

# A trial's own process reserves memory and no CPU: if it held CPUs, its workers could wait for them forever.
TRIAL_PROCESS_BYTES = 2**30


@dataclass(frozen=True)
class Placement:
    """Workers and what each reserves."""

    num_workers: int
    use_gpu: bool
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """Ray's resource request of a worker."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.use_gpu else {})


def uses_gpu(scaling: ScalingConfig) -> bool:
    """Whether workers get GPUs: for `auto`, if the cluster has any."""
    return any(node.get("GPU") for node in _nodes()) if scaling.use_gpu == "auto" else scaling.use_gpu


def place(config: RunConfig) -> Placement:
    """Decide the number of workers, or the fewest; check that a step divides, and that there is or may be room."""
    scaling, use_gpu = config.scaling, uses_gpu(config.scaling)
    if scaling.num_workers != "auto":
        workers, _ = scaling.bounds(auto=1)
    else:
        fit, _ = room(Placement(1, use_gpu, scaling.cpus_per_worker, scaling.gpus_per_worker))
        most = max(1, fit - scaling.async_validation) if use_gpu else 2
        # BatchNorm and mining need two images per worker.
        workers = min(most, config.training.global_batch_size // 2)
    placement = Placement(workers, use_gpu, scaling.cpus_per_worker, scaling.gpus_per_worker)
    config.check_workers(workers)
    config.check_device(has_gpu=use_gpu)
    if scaling.wait_seconds == 0:
        check_room(placement)
        fit, arithmetic = room(placement)
        if scaling.async_validation and fit == workers:
            reason = f"no room is left beside {workers} worker{'s' if workers > 1 else ''}: {arithmetic}"
            remedy = "leave it out, or " + ("use fewer workers" if workers > 1 else "add a node")
            raise UnavailableError("scaling.async_validation", True, reason, remedy)
    return placement


def workers_per_trial(scaling: ScalingConfig) -> int:
    """Workers per trial; for `auto` few, so that more trials run in parallel: one on a GPU, else two."""
    return scaling.bounds(auto=1 if uses_gpu(scaling) else 2)[0]


def max_concurrent(scaling: ScalingConfig, most: int | None, placement: Placement) -> int:
    """Trials in parallel, at most `most`: one more than fit, so that its process is up when resources become free."""
    if scaling.wait_seconds > 0:  # the cluster grows, so its present size says nothing
        assert most is not None
        return most
    fit = check_room(placement) + 1
    return fit if most is None else min(most, fit)


def check_room(placement: Placement) -> int:
    """How many such groups of workers fit on the cluster; raises UnavailableError with the arithmetic if none does."""
    fit, arithmetic = room(placement)
    if fit < placement.num_workers:
        reason = f"cannot be placed: {arithmetic}; together {fit} of {placement.num_workers}"
        remedy = "use fewer workers or smaller shares, or set scaling.wait_seconds if the cluster scales up"
        raise UnavailableError("scaling.num_workers", placement.num_workers, reason, remedy)
    return fit // placement.num_workers


def room(placement: Placement) -> tuple[int, str]:
    """How many such workers fit on the cluster, and the arithmetic in words."""
    names, nodes = placement.resources_per_worker, _nodes()
    fits = [_workers_on(node, placement) for node in nodes]
    needs = " and ".join(f"{share:g} {name}" for name, share in names.items())
    have = "; ".join(
        f"{' and '.join(f'{node.get(name, 0.0):g} {name}' for name in names)} -> {fit}"
        for node, fit in zip(nodes, fits, strict=True)
    )
    return sum(fits), f"a worker needs {needs} on one node, and the nodes have room for this many: {have}"


def waiting(placement: Placement, since: float) -> str:
    """What workers wait for, and since when (a time in seconds since 1970), in words."""
    fit, arithmetic = room(placement)
    begin = time.strftime("%H:%M:%S", time.localtime(since))
    state = f"together {fit} of {placement.num_workers}; add nodes, and the run goes on"
    if fit >= placement.num_workers:
        state = "other jobs may be using them, or their processes are still starting"
    return f"waiting since {begin} for {placement.num_workers} workers to be placed: {arithmetic}; {state}"


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _workers_on(node: Mapping[str, float], placement: Placement) -> int:
    """Workers that fit on a node. A GPU share below 1 is on one GPU, a share above takes whole ones."""
    cpus = math.floor(node.get("CPU", 0.0) / placement.cpus_per_worker + 1e-9)
    if not placement.use_gpu:
        return cpus
    gpus, share = node.get("GPU", 0.0), placement.gpus_per_worker
    on_gpus = math.floor(gpus) * math.floor(1 / share + 1e-9) if share < 1 else math.floor(gpus / share)
    return min(cpus, on_gpus)
