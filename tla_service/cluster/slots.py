"""How many trials a cluster has room for at a time."""

import math
from collections.abc import Mapping, Sequence

import ray

from tla_service.cluster.session import Placement
from tla_service.config import ScalingConfig
from tla_service.errors import UnavailableError

# A trial's own process reserves memory and no CPU: processes that hold what their workers wait for would wait for ever.
TRIAL_PROCESS_BYTES = 2**30


def workers_per_trial(scaling: ScalingConfig) -> int:
    """Workers of a trial; for `auto` few, so that more trials run at a time: one on a GPU, else two."""
    if scaling.num_workers != "auto":
        return scaling.num_workers
    gpus = ray.cluster_resources().get("GPU", 0.0) > 0
    return 1 if (gpus if scaling.use_gpu == "auto" else scaling.use_gpu) else 2


def count_slots(placement: Placement) -> int:
    """How many trials the nodes of the cluster have room for at a time.

    Raises:
        UnavailableError: Not for one.
    """
    return check_room([node["Resources"] for node in ray.nodes() if node["Alive"]], placement)


def max_concurrent(scaling: ScalingConfig, most: int | None, placement: Placement) -> int:
    """Trials in parallel: one more than fit, so that its processes are up when resources become free.

    Args:
        scaling: With `wait_seconds` the cluster grows, so what fits now says nothing; `most` must be given.
        most: The limit that was configured.
        placement: Workers of a trial.

    Raises:
        UnavailableError: Not one trial fits.
    """
    if scaling.wait_seconds > 0:
        assert most is not None
        return most
    room = count_slots(placement) + 1
    return room if most is None else min(most, room)


def check_room(nodes: Sequence[Mapping[str, float]], placement: Placement) -> int:
    """See that a trial can be placed at all; returns how many whose workers all find room together.

    Args:
        nodes: Resources of each node, as Ray counts them.
        placement: Workers a trial and what each reserves.

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
    """Workers that a node has room for. A share of a GPU below 1 lies on one GPU, a share above takes whole ones."""
    cpus = math.floor(node.get("CPU", 0.0) / placement.cpus_per_worker + 1e-9)
    if not placement.use_gpu:
        return cpus
    gpus, share = node.get("GPU", 0.0), placement.gpus_per_worker
    on_gpus = math.floor(gpus) * math.floor(1 / share + 1e-9) if share < 1 else math.floor(gpus / share)
    return min(cpus, on_gpus)
