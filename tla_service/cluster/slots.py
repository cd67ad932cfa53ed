"""How many trials a cluster has room for at a time."""

import math
import time
from collections.abc import Mapping, Sequence

import ray

from tla_service.cluster.session import Placement
from tla_service.errors import UnavailableError

# A trial's own process reserves memory and no CPU: processes that hold what their workers wait for would wait for ever.
TRIAL_PROCESS_BYTES = 2**30
ASK_SECONDS = 2.0


class Room:
    """How many trials may be under way, on a cluster that may grow and shrink meanwhile.

    Args:
        placement: Workers of a trial.
        most: Trials at a time, at most; none: as many as fit.
        on_deck: Trials beyond those that fit, which wait for the next place. On a cluster that scales up they are what
            it grows for.
    """

    def __init__(self, placement: Placement, most: int | None, on_deck: int) -> None:
        self._placement, self._most, self._on_deck = placement, most, on_deck
        self._asked = -math.inf
        self._fit = 0
        self.slots = 0  # the most that ever fitted together

    def limit(self, trained: int | None = None) -> int:
        """Trials that may be under way now, those on deck included.

        Args:
            trained: How many of those under way have begun to train. None is taken on deck before every place is
                taken: its start would hold up theirs.
        """
        if time.monotonic() - self._asked > ASK_SECONDS:
            self._asked = time.monotonic()
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._fit = sum(_workers_on(node, self._placement) for node in nodes) // self._placement.num_workers
            self.slots = max(self.slots, self._fit if self._most is None else min(self._fit, self._most))
        if self._most is not None and self._most < self._fit:
            return self._most  # one on deck would find a place
        if trained is not None and trained < self._fit:
            return self._fit
        return self._fit + self._on_deck


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
