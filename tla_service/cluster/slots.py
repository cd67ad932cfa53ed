"""How many trials fit on a cluster."""

import math
from collections.abc import Mapping, Sequence

import ray

from tla_service.cluster.session import Placement
from tla_service.config import ScalingConfig
from tla_service.errors import UnavailableError

# A trial's own process reserves memory and no CPU: if it held CPUs, its workers could wait for them forever.
TRIAL_PROCESS_BYTES = 2**30


def workers_per_trial(scaling: ScalingConfig) -> int:
    """Workers per trial; for `auto` few, so that more trials run in parallel: one on a GPU, else two."""
    if scaling.num_workers != "auto":
        return scaling.num_workers
    gpus = ray.cluster_resources().get("GPU", 0.0) > 0
    return 1 if (gpus if scaling.use_gpu == "auto" else scaling.use_gpu) else 2


def max_concurrent(scaling: ScalingConfig, most: int | None, placement: Placement) -> int:
    """Trials in parallel: one more than fit, so that its process is up when resources become free.

    Args:
        scaling: With `wait_seconds` the cluster grows, so its present size says nothing; `most` must be given.
        most: The configured limit.
        placement: Workers of a trial.

    Raises:
        UnavailableError: Not one trial fits.
    """
    if scaling.wait_seconds > 0:
        assert most is not None
        return most
    fit = check_room([node["Resources"] for node in ray.nodes() if node["Alive"]], placement) + 1
    return fit if most is None else min(most, fit)


def check_room(nodes: Sequence[Mapping[str, float]], placement: Placement) -> int:
    """Check that a trial can be placed on nodes with these resources; returns how many fit together.

    Raises:
        UnavailableError: Not one trial fits; the message shows the arithmetic.
    """
    fits = [_workers_on(node, placement) for node in nodes]
    slots = sum(fits) // placement.num_workers
    if slots > 0:
        return slots
    needs = " and ".join(f"{share:g} {name}" for name, share in placement.resources_per_worker.items())
    have = "; ".join(
        f"{' and '.join(f'{node.get(name, 0.0):g} {name}' for name in placement.resources_per_worker)} -> {fit}"
        for node, fit in zip(nodes, fits, strict=True)
    )
    raise UnavailableError(
        "scaling.num_workers",
        placement.num_workers,
        f"a trial can never be placed: a worker needs {needs} on one node, and the nodes have room for this many: "
        f"{have}; together {sum(fits)} of {placement.num_workers}",
        "use fewer workers or smaller shares, or set scaling.wait_seconds if the cluster scales up",
    )


def _workers_on(node: Mapping[str, float], placement: Placement) -> int:
    """Workers that fit on a node. A GPU share below 1 is on one GPU, a share above takes whole ones."""
    cpus = math.floor(node.get("CPU", 0.0) / placement.cpus_per_worker + 1e-9)
    if not placement.use_gpu:
        return cpus
    gpus, share = node.get("GPU", 0.0), placement.gpus_per_worker
    on_gpus = math.floor(gpus) * math.floor(1 / share + 1e-9) if share < 1 else math.floor(gpus / share)
    return min(cpus, on_gpus)
