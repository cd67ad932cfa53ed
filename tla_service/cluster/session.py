"""Joining a Ray cluster, and whether a run fits it."""

import contextlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train  # here, so that `starting` never imports parts of ray in two threads at once
from ray._private.services import get_webui_url_from_internal_kv
from ray.exceptions import AuthenticationError, RayError
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from tla_service.config import RunConfig, ScalingConfig
from tla_service.errors import UnavailableError
from tla_service.files import check_socket_path

CONNECT_SECONDS = 5
DASHBOARD_SECONDS = 60
# An address that refuses every connection: TCP port 1 is reserved.
NO_DASHBOARD = "http://127.0.0.1:1"


@dataclass(frozen=True)
class Placement:
    """Workers and what each reserves."""

    num_workers: int
    use_gpu: bool
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """Ray's resource request of a worker."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.use_gpu else {})


class _Scaled(Protocol):
    @property
    def scaling(self) -> ScalingConfig: ...


@contextlib.contextmanager
def ray_session(config: _Scaled, *, debug: bool = False, dashboard: bool = False) -> Iterator[None]:
    """Join the configured cluster, or start one on this machine, for the duration of the block.

    Args:
        config: Settings with a `scaling` section.
        debug: Show the log of Ray and its workers.
        dashboard: Start a dashboard with a local cluster. It takes seconds; Ray Train needs it to clean up after a
            killed run.

    Raises:
        UnavailableError: The cluster does not answer, or does not start.
    """
    # Ray warns that this becomes the default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.scaling.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    logging.getLogger("ray.train").setLevel(logging.INFO if debug else logging.WARNING)
    if address:
        _check_address(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise UnavailableError("scaling.address", address, *_not_joined(error)) from error
    else:
        _check_temporary_folder()
        # Nobody preempts this machine with notice; without the watcher, workers start a second earlier.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        try:
            # "local": without it Ray joins a cluster that somebody else started on this machine.
            ray.init("local", num_cpus=_local_cpus(config.scaling), include_dashboard=dashboard, **quiet)
        except Exception as error:  # Ray raises no class of its own here
            reason = f"does not start on this machine ({' '.join(str(error).split())[:200]})"
            remedy = f"look at load, memory and the logs in {_temporary_folder()[1]}/ray/session_latest/logs"
            raise UnavailableError("Ray", None, reason, remedy) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def starting(session: AbstractContextManager[None]) -> Iterator[Callable[[], None]]:
    """Enter a `ray_session` in the background, while the caller imports and checks.

    The system kills Ray's daemons when the thread that started them ends, so that thread lasts as long as the block.

    Args:
        session: The session, not yet entered.

    Yields:
        A function that waits until the cluster is joined, and raises what joining it raised.
    """
    with ThreadPoolExecutor(1, "ray") as thread:
        joined = thread.submit(session.__enter__)
        try:
            yield joined.result
        finally:
            if joined.exception() is None:
                thread.submit(session.__exit__, None, None, None).result()


def _not_joined(error: Exception) -> tuple[str, str]:
    """Reason and remedy of a cluster that could not be joined."""
    text = " ".join(str(error).split())
    if isinstance(error, AuthenticationError):
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        return "the cluster refuses the token, or the lack of one", remedy
    if "Version mismatch" in text:
        versions = text.partition("Version mismatch: ")[2]
        return f"another version of Ray or Python ({versions[:200]})", "install the cluster's versions here"
    return f"no Ray cluster answers ({text[:200]})", "start one with: ray start --head"


def _temporary_folder() -> tuple[str, str]:
    """The variable that sets a local cluster's folder for sockets and logs, and the folder, as Ray resolves it."""
    found = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "RAY_TMPDIR")
    return found, os.environ.get(found) or "/tmp"


def _check_temporary_folder() -> None:
    """Refuse a folder that is too deep, read-only or full, which Ray reports late and unclearly."""
    variable, folder = _temporary_folder()
    remedy = "set RAY_TMPDIR to a short folder on a local disk, such as /tmp"
    socket_path = f"ray/session_{'0' * len('2026-01-01_00-00-00_000000')}_{os.getpid()}/sockets/plasma_store"
    check_socket_path(variable, folder, socket_path, "Ray's sockets", remedy)
    try:
        Path(folder, "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(folder, "ray")) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        reason = f"Ray cannot write there ({(error.strerror or str(error)).lower()})"
        raise UnavailableError(variable, folder, reason, remedy.replace("short ", "")) from error


def place(config: RunConfig) -> Placement:
    """Decide the number of workers, and check that the cluster has the resources.

    Raises:
        ConfigError: A step cannot be divided among that many workers.
        UnavailableError: It has not, and `scaling.wait_seconds` is 0.
    """
    scaling = config.scaling
    total: dict[str, float] = ray.cluster_resources()
    gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 0.0)
    use_gpu = gpus > 0 if scaling.use_gpu == "auto" else scaling.use_gpu
    if isinstance(scaling.num_workers, int):
        workers = scaling.num_workers
    else:
        # BatchNorm and mining need two images per worker.
        most = config.training.global_batch_size // 2
        workers = min(most, max(1, int(gpus / scaling.gpus_per_worker))) if use_gpu else min(most, 2)
    placement = Placement(workers, use_gpu, scaling.cpus_per_worker, scaling.gpus_per_worker)
    config.check_workers(workers)
    config.check_device(has_gpu=use_gpu)
    if scaling.wait_seconds == 0:
        needed = {name: workers * share for name, share in placement.resources_per_worker.items()}
        for name, available in (("GPU", gpus), ("CPU", cpus)):
            if needed.get(name, 0.0) > available:
                share = placement.resources_per_worker[name]
                raise UnavailableError(
                    "scaling.num_workers",
                    workers,
                    f"needs {workers} x {share:g} = {needed[name]:g} {name}s, the cluster has {available:g}",
                    "use fewer workers, or set scaling.wait_seconds if the cluster scales up",
                )
    return placement


@contextlib.contextmanager
def own_dashboard() -> Iterator[None]:
    """Point Ray's state API at the dashboard of this cluster only.

    A cluster without a dashboard still announces Ray's default address, where another cluster's dashboard may listen,
    and `ray job submit` may set one in the environment. Such a dashboard reports the run as unknown, and Ray Train
    then removes its workers.
    """
    url = get_webui_url_from_internal_kv()  # empty without a dashboard
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{url}" if url else NO_DASHBOARD
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def check_dashboard() -> None:
    """Check that the cluster's dashboard answers.

    Ray Train frees a killed run's resources only once the dashboard reports it dead. Without one, every trial that is
    stopped early would keep its workers' resources.

    Raises:
        UnavailableError: It does not answer within `DASHBOARD_SECONDS`.
    """
    deadline = time.monotonic() + DASHBOARD_SECONDS
    while True:
        try:
            with own_dashboard():
                list_nodes(limit=1, timeout=CONNECT_SECONDS)
        except (RayStateApiException, OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                address = ray.get_runtime_context().gcs_address
                reason = f"the cluster's dashboard does not answer ({' '.join(str(error).split())[:200]})"
                remedy = "install ray[default] and start the head with its dashboard"
                raise UnavailableError("scaling.address", address, reason, remedy) from error
            time.sleep(1)
        else:
            return


def _check_address(address: str) -> None:
    """Connect to host:port first: Ray itself waits for minutes when nothing answers."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto" or "local" fail at once
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = f"no Ray cluster answers ({(error.strerror or str(error)).lower()})"
        raise UnavailableError("scaling.address", address, reason, "start one with: ray start --head") from error


def _local_cpus(scaling: ScalingConfig) -> int:
    """CPUs to declare on this machine: at least as many as the workers reserve."""
    workers = 2 if scaling.num_workers == "auto" else scaling.num_workers
    return max(os.cpu_count() or 1, int(-(-workers * scaling.cpus_per_worker // 1)))
