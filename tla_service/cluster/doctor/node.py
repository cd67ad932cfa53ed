"""Checks that run on a node, in a Ray task."""

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from tla_service.errors import UserError

_PACKAGES = ("ray", "torch", "torchvision", "mlflow", "numpy", "pyarrow", "tla-service")
_SHARED_MEMORY = Path("/dev/shm")


def facts(data_root: str | None, cache_dir: str) -> dict[str, Any]:
    """Versions, free bytes of shared memory and cache disk, and why the data root cannot be read, if so."""
    return {
        "versions": versions(),
        "shared_memory": _free(_SHARED_MEMORY),
        "cache_free": _free(Path(cache_dir).expanduser()),
        "data": _data(data_root),
    }


def versions() -> dict[str, str]:
    """Versions by package; ``cuda`` is torch's, ``driver`` the GPU driver's."""
    import torch

    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none", "driver": "none"}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    try:
        import pynvml

        pynvml.nvmlInit()
        found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001 - there is no NVIDIA driver
        return found
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


def use_storage(storage: str, size: int) -> tuple[float, float]:
    """Write and read an object of that many bytes below a folder or s3:// prefix; returns the seconds of each.

    Raises:
        OSError: It fails, or returns other content.
    """
    from pyarrow.fs import FileSystem

    filesystem, root = FileSystem.from_uri(storage if "://" in storage else Path(storage).absolute().as_uri())
    content = os.urandom(size)
    path = f"{root}/.checkup-{platform.node()}-{os.getpid()}"
    if "://" not in storage:
        filesystem.create_dir(root)
    began = time.perf_counter()
    with filesystem.open_output_stream(path) as file:
        file.write(content)
    written = time.perf_counter()
    with filesystem.open_input_stream(path) as file:
        is_same = file.read() == content
    read = time.perf_counter()
    filesystem.delete_file(path)
    if not is_same:
        raise OSError("the object read differs from the object written")
    return written - began, read - written


def use_gpus() -> list[tuple[str, float]]:
    """Multiply matrices on every visible GPU; returns the name and bfloat16 TFLOP/s of each."""
    import torch

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


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _data(root: str | None) -> str:
    from tla_service.data import check_root

    try:
        check_root(root)
    except UserError as error:
        return str(error)
    return ""
