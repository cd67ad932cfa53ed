"""The worker process: rank, device, process group, collectives, seeds, precision."""

import contextlib
import ctypes
import datetime
import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from tla_service.errors import UnavailableError, UserError

# Parameters of glibc's mallopt(3): blocks mapped one by one at most, and what may lie free at the heap's end.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1
T = TypeVar("T")


@dataclass(frozen=True)
class WorkerContext:
    """One process of a run, by its rank among all, and the device of its network and batches."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes checkpoints and progress."""
        return self.rank == 0


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, well mixed: (0, 1), (1, 0) and (0, 1, 0) are unrelated."""
    # The count is mixed in because numpy reads trailing zeros as absent.
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)


def generator(device: torch.device, *parts: int) -> torch.Generator:
    """A generator whose draws are a function of the given numbers alone, so resuming needs no saved state."""
    return torch.Generator(device=device).manual_seed(mixed_seed(*parts))


def uniform_noise(images: Tensor, radius: float, random: torch.Generator | None) -> Tensor:
    """Noise of the images' shape, uniform in [-radius, radius)."""
    draw = torch.rand(images.shape, generator=random, device=images.device, dtype=images.dtype)
    return (2 * draw - 1) * radius


def collective_timeout(hang_seconds: float) -> int:
    """Seconds after which torch ends a collective, where `training.watch` finds no rank at fault or does not run."""
    return max(1800, math.ceil(2 * hang_seconds))


@contextlib.contextmanager
def process_group(device: torch.device, hang_seconds: float) -> Iterator[WorkerContext]:
    """Join the process group that torchrun's environment describes; a lone process needs none."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            reason = f"{local_rank + 1} processes or more were started on a node where torch sees {gpus} GPUs"
            remedy = f"start torchrun with --nproc-per-node {gpus}, or set scaling.use_gpu=false"
            raise UnavailableError("scaling.use_gpu", None, reason, remedy)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    context = WorkerContext(rank, world_size, device)
    if world_size == 1:
        yield context
        return
    timeout = datetime.timedelta(seconds=collective_timeout(hang_seconds))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield context
    finally:
        dist.destroy_process_group()  # without a barrier: one would hang the healthy ranks when another has failed


def all_reduce_sum(values: Tensor, context: WorkerContext) -> Tensor:
    """Sum a tensor over all workers, in place; every worker gets the sum."""
    if context.world_size > 1:
        dist.all_reduce(values)
    return values


@contextlib.contextmanager
def failing_together(context: WorkerContext) -> Iterator[None]:
    """Run a block on every worker; raise the first one's `UserError` on all, so that none waits for it."""
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    for found in gather_objects(error, context):
        if found is not None:
            raise found


def gather_objects(value: T, context: WorkerContext) -> list[T]:
    """Every worker's value, by rank, on all workers; values must pickle."""
    if context.world_size == 1:
        return [value]
    values = [value] * context.world_size
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor, sizes: Sequence[int], context: WorkerContext) -> Tensor:
    """Rows of all workers, in rank order: (n_r, ...) to (sum of sizes, ...). Gradients flow back to a row's owner."""
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


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's running statistics by name, which differ between workers within an epoch."""
    # Buffers that are not saved are constants: the mean of three equal floats may be another one.
    saved, buffers = network.state_dict(), network.named_buffers()
    return {name: buffer for name, buffer in buffers if buffer.is_floating_point() and name in saved}


def average_buffers(network: nn.Module, context: WorkerContext) -> None:
    """Make BatchNorm's running statistics the mean over workers: each has seen only its own shards."""
    for buffer in running_statistics(network).values():
        all_reduce_sum(buffer, context).div_(context.world_size)


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the processor and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def keep_freed_memory() -> None:
    """Make glibc, if it is the C library, keep freed memory for the next step; the peak is then held until the end.

    By default it returns the large activations of each CPU step to the system, which then zeroes every page again.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Run the network in bfloat16 if `precision` says so; parameters, losses and attacks keep their types."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def wide(values: Tensor) -> Tensor:
    """Float32 for bfloat16 and float16; wider types stay as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
