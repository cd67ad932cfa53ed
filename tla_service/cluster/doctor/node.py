"""Checks that run on nodes: in Ray tasks, and in workers that are started like those of a run."""

import contextlib
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig

from tla_service.cluster.placement import Placement
from tla_service.cluster.session import own_dashboard
from tla_service.cluster.storage import RunFolder
from tla_service.cluster.train import trainer_of
from tla_service.data import check_root
from tla_service.errors import UserError
from tla_service.files import expanded
from tla_service.job import environment

_PACKAGES = ("ray", "torch", "torchvision", "mlflow", "numpy", "pyarrow", "tla-service")
_SHARED_MEMORY = Path("/dev/shm")
_REPEATS = 5


def facts(data_root: str | None, cache_dir: str) -> dict[str, Any]:
    """Versions, free bytes of shared memory and cache disk, and why the data root cannot be read, if so."""
    data = ""
    try:
        check_root(data_root)
    except UserError as error:
        data = str(error)
    free, cache_free = _free(_SHARED_MEMORY), _free(expanded("data.cache_dir", cache_dir))
    return {"versions": versions(), "shared_memory": free, "cache_free": cache_free, "data": data}


def versions() -> dict[str, str]:
    """Versions by package; ``cuda`` is torch's, ``driver`` the GPU driver's."""
    installed = environment()
    found = {"python": installed["python"], "cuda": installed["cuda"] or "none", "driver": "none"}
    found |= {name: installed["packages"].get(name, "missing") for name in _PACKAGES}
    with contextlib.suppress(Exception):  # there is no NVIDIA driver
        import pynvml

        pynvml.nvmlInit()
        found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    return found


def use_shared_memory(size: int) -> str:
    """Write that many bytes to shared memory; returns the error, if any."""
    path = _SHARED_MEMORY / f"tla-checkup-{os.getpid()}"
    try:
        path.write_bytes(bytes(size))
    except OSError as error:
        return error.strerror or str(error)
    finally:
        path.unlink(missing_ok=True)
    return ""


def use_storage(storage: str, size: int, token: str) -> tuple[float, float]:
    """Write and read a file of that many bytes, and see the driver's mark.

    Returns the seconds of each, or raises UnavailableError.
    """
    folder, name = RunFolder(storage, ""), f".checkup-{platform.node()}-{os.getpid()}"
    folder.check_shared(token)
    content = os.urandom(size)
    began = time.perf_counter()
    folder.write(name, content)
    written = time.perf_counter()
    is_same = folder.read(name) == content
    read = time.perf_counter()
    folder.delete(name)
    if not is_same:
        raise folder.unavailable(ValueError("the file read differs from the file written"))
    return written - began, read - written


def use_gpus() -> list[tuple[str, float]]:
    """Multiply matrices on every visible GPU; returns the name and bfloat16 TFLOP/s of each."""
    found = []
    for index in range(torch.cuda.device_count()):
        left = torch.randn(8192, 8192, device=f"cuda:{index}", dtype=torch.bfloat16)
        product = left @ left
        torch.cuda.synchronize(index)
        began = time.perf_counter()
        for _ in range(10):
            product = left @ left
        torch.cuda.synchronize(index)
        seconds = time.perf_counter() - began
        if not torch.isfinite(product).all():
            raise RuntimeError(f"cuda:{index} computes non-finite numbers")
        found.append((torch.cuda.get_device_name(index), 10 * 2 * 8192**3 / seconds / 1e12))
    return found


def use_workers(placement: Placement, size: int, timeout_seconds: float) -> dict[str, Any]:
    """All-reduce a tensor of that many bytes; raises if the workers fail or the sum is wrong.

    Returns `backend`, `seconds` of the fastest all-reduce, and `gigabytes_per_second`, its bus bandwidth:
    2 (n-1)/n * size / seconds.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(timeout_seconds)
    # Else workers that find no room are waited for without end.
    once = FailureConfig(controller_failure_limit=0)  # type: ignore[call-arg] # of Ray Train's second version
    number, timeout = placement.num_workers, max(1, int(timeout_seconds))
    trainer = trainer_of(_all_reduce, {"size": size}, placement, timeout, num_workers=number, failure_config=once)
    with own_dashboard():
        return trainer.fit().return_value  # type: ignore[attr-defined]


def _all_reduce(settings: dict[str, Any]) -> dict[str, Any]:
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


def _free(path: Path) -> int:
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free
