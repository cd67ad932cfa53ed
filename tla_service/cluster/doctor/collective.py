"""An all-reduce over workers that are started like those of a run: with the same trainer, placement and backend."""

import time
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import RunConfig as RayRunConfig
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from tla_service.cluster.session import Placement

_REPEATS = 5


def measure(placement: Placement, size: int, storage: str, name: str, timeout_seconds: float) -> dict[str, Any]:
    """All-reduce a tensor of that many bytes; raises if the workers fail or the sum is wrong.

    Returns:
        `backend`; `seconds` of the fastest all-reduce; `gigabytes_per_second`, its bus bandwidth: 2 (n-1)/n * size /
        seconds.
    """
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={"size": size},
        torch_config=TorchConfig(
            backend="gloo" if placement.use_gpu and placement.gpus_per_worker < 1 else None,
            timeout_s=int(timeout_seconds),
        ),
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu=placement.use_gpu,
            resources_per_worker=placement.resources_per_worker,
        ),
        run_config=RayRunConfig(name=name, storage_path=storage),
    )
    return trainer.fit().return_value  # type: ignore[attr-defined]


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    device = ray.train.torch.get_device()
    world = ray.train.get_context().get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    numbers = torch.ones(settings["size"] // 4, device=device)
    dist.all_reduce(numbers)  # connects
    if float(numbers[0]) != world:
        raise RuntimeError(f"the sum over {world} workers is {float(numbers[0])}")
    seconds = []
    for _ in range(_REPEATS):
        numbers.fill_(1.0)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    best = min(seconds)
    rate = settings["size"] * 2 * (world - 1) / world / best / 1e9
    return {"backend": dist.get_backend(), "seconds": best, "gigabytes_per_second": rate}
