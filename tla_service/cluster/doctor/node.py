"""What is asked of a node, in a Ray task there."""

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from tla_service.errors import UserError

PACKAGES = ("ray", "torch", "torchvision", "mlflow", "numpy", "pyarrow", "tla-service")
SHARED_MEMORY = Path("/dev/shm")


def facts(data_root: str | None, cache_dir: str) -> dict[str, Any]:
    """Versions, memory, disk, clock; whether the data root can be read. Numbers are bytes and seconds."""
    # The first import takes seconds, which must not be taken for a clock that is wrong.
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {
        "versions": versions | _gpu_versions(),
        "shared_memory": _free(SHARED_MEMORY),
        "cache_free": _free(Path(cache_dir).expanduser()),
        "data": _data(data_root),
        "auth": os.environ.get("RAY_AUTH_MODE", ""),
        "time": time.time(),
    }


def use_shared_memory(size: int) -> str:
    """Write that many bytes to shared memory; an empty answer is a good one."""
    path = SHARED_MEMORY / f"tla-checkup-{os.getpid()}"
    try:
        path.write_bytes(bytes(size))
    except OSError as error:
        return error.strerror or str(error)
    finally:
        path.unlink(missing_ok=True)
    return ""


def use_storage(storage: str, size: int) -> tuple[float, float]:
    """Write and read an object of that many bytes below a folder or s3:// prefix; seconds for each.

    Raises:
        OSError: It cannot be done, or what is read is not what was written.
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
        same = file.read() == content
    read = time.perf_counter()
    filesystem.delete_file(path)
    if not same:
        raise OSError("what was read is not what was written")
    return written - began, read - written


def use_gpus() -> list[tuple[str, float]]:
    """Multiply matrices on every GPU that this task sees: its name and TFLOP/s in bfloat16.

    Raises:
        RuntimeError: A GPU does not work.
    """
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
            raise RuntimeError(f"cuda:{index} computes numbers that are not finite")
        found.append((torch.cuda.get_device_name(index), 10 * 2 * 8192**3 / seconds / 1e12))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _gpu_versions() -> dict[str, str]:
    import torch

    versions = {"cuda": torch.version.cuda or "none"}
    try:
        import pynvml

        pynvml.nvmlInit()
        versions["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001 - no NVIDIA driver here
        versions["driver"] = "none"
    return versions


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
