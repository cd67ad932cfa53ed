"""Model of the step time on many GPUs: measured or assumed compute, all-reduce from bytes and bandwidths."""

import math
from dataclasses import dataclass

GPUS = (8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Cluster:
    """Assumed properties of a cluster.

    Attributes:
        gpus_per_node: GPUs that share a node's fast links.
        node_bandwidth: Bytes/s that a GPU sends within its node.
        network_bandwidth: Bytes/s that a GPU sends to other nodes.
        latency: Seconds of one message between nodes.
        jitter: Standard deviation of a worker's step time, as a share of it; all wait for the slowest.
    """

    gpus_per_node: int = 8
    node_bandwidth: float = 300e9
    network_bandwidth: float = 50e9
    latency: float = 20e-6
    jitter: float = 0.01

    def all_reduce_seconds(self, num_bytes: float, workers: int, buckets: int) -> float:
        """A hierarchical all-reduce: scatter and gather in each node, a ring of nodes for each GPU's share."""
        local = min(workers, self.gpus_per_node)
        nodes = math.ceil(workers / self.gpus_per_node)
        seconds = 2 * (local - 1) / local * num_bytes / self.node_bandwidth
        if nodes > 1:
            seconds += 2 * (nodes - 1) / nodes * num_bytes / local / self.network_bandwidth
            seconds += buckets * 2 * math.ceil(math.log2(nodes)) * self.latency
        return seconds


def efficiency(
    compute: float, backward: float, num_bytes: float, buckets: int, workers: int, cluster: Cluster
) -> float:
    """Weak scaling: step time of one worker over that of `workers`, same batch each; at most 1.

    Args:
        compute: Seconds of a lone worker's step.
        backward: Seconds of it in the update's backward pass, during which gradients travel.
        num_bytes: Gradient bytes of a step.
        buckets: Messages they are sent in; the last one cannot travel before the backward pass has ended.
        workers: GPUs.
        cluster: The machine.
    """
    sending = cluster.all_reduce_seconds(num_bytes, workers, buckets)
    exposed = max(sending / buckets, sending - backward)
    slowest = compute * cluster.jitter * math.sqrt(2 * math.log(workers)) if workers > 1 else 0.0
    return compute / (compute + exposed + slowest)
