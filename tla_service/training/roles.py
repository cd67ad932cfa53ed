"""One forward pass for all roles of a batch; rows gathered and buffers averaged over workers."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from tla_service.models import ModelOutput
from tla_service.runtime import WorkerContext


class RoleForward(nn.Module):
    """One forward pass for every role (adversarial, clean, negatives, ...): what DDP wraps, once per step.

    With `together`, BatchNorm sees all roles as one batch; otherwise each role is normalized by its own statistics, as
    in the authors' code.
    """

    def __init__(self, network: nn.Module, *, together: bool) -> None:
        super().__init__()
        self.network, self.together = network, together

    def forward(self, *roles: Tensor) -> tuple[ModelOutput, ...]:
        """Images of each role, (N_i, C, H, W), to its logits and embeddings."""
        if not self.together or len(roles) == 1:
            return tuple(cast("ModelOutput", self.network(images)) for images in roles)
        sizes = [len(images) for images in roles]
        output = cast("ModelOutput", self.network(torch.cat(roles)))
        parts = zip(output.logits.split(sizes), output.embeddings.split(sizes), strict=True)
        return tuple(ModelOutput(logits, embeddings) for logits, embeddings in parts)


def shard_sizes(total: int, world_size: int) -> list[int]:
    """Rows of `total` on each worker, as `torch.tensor_split` cuts them."""
    return [total // world_size + (rank < total % world_size) for rank in range(world_size)]


def gather_rows(rows: Tensor, sizes: Sequence[int], context: WorkerContext) -> Tensor:
    """Rows of all workers, in rank order: (n_r, ...) to (sum of sizes, ...).

    Gradients flow back to the worker that owns a row, so DDP's average over workers is the gradient of the mean loss.
    """
    if context.world_size == 1:
        return rows
    padded = torch.zeros((max(sizes), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    padded = torch.cat([rows, padded[len(rows) :]])
    if rows.requires_grad:
        gathered = list(all_gather(padded))
    else:
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def average_buffers(network: nn.Module, context: WorkerContext) -> None:
    """Make BatchNorm's running statistics the mean over workers: each has seen only its own shards."""
    if context.world_size == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer.div_(context.world_size)
