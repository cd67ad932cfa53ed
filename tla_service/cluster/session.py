"""Joining a Ray cluster, or starting one on this machine."""

import contextlib
import importlib
import logging
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray
from ray._private.services import get_webui_url_from_internal_kv
from ray.exceptions import AuthenticationError, RayError
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from tla_service.config import ScalingConfig
from tla_service.errors import UnavailableError
from tla_service.files import check_socket_path

CONNECT_SECONDS = 5
DASHBOARD_SECONDS = 60


@contextlib.contextmanager
def ray_session(scaling: ScalingConfig, *, debug: bool = False, dashboard: bool = False) -> Iterator[None]:
    """Join the configured cluster, or start one on this machine, for the duration of the block.

    A `dashboard` is started with a local cluster, which takes seconds, or looked for: without one Ray Train does not
    free the resources of a killed run, such as a trial stopped early. `debug` shows the log of Ray and its workers.
    """
    # Ray warns that this becomes the default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = scaling.address or os.environ.get("RAY_ADDRESS")
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
        # The newest tenth of Ray's records of calls: Ray Train polls its workers, so all would take 300 MB after hours.
        os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "10000")
        workers, _ = scaling.bounds(auto=2)
        # What the workers reserve, and validation beside them.
        cpus = max(os.cpu_count() or 1, math.ceil((workers + scaling.async_validation) * scaling.cpus_per_worker))
        try:
            # "local": without it Ray joins a cluster that somebody else started on this machine.
            ray.init("local", num_cpus=cpus, include_dashboard=dashboard, **quiet)
        except Exception as error:  # Ray raises no class of its own here
            reason = f"does not start on this machine ({' '.join(str(error).split())[:200]})"
            remedy = f"look at load, memory and the logs in {_temporary_folder()[1]}/ray/session_latest/logs"
            raise UnavailableError("Ray", None, reason, remedy) from error
    try:
        if dashboard:
            _check_dashboard()
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def warm_session(scaling: ScalingConfig, module: str, *, debug: bool = False) -> Iterator[None]:
    """As `ray_session`; its workers import a module at once, so that their first tasks need not wait for that."""
    with ray_session(scaling, debug=debug):
        # By its name: it may be one that this process is still importing.
        warm = ray.remote(lambda: bool(importlib.import_module(module))).options(num_cpus=scaling.cpus_per_worker)
        for _ in range(scaling.num_workers if isinstance(scaling.num_workers, int) else 2):
            warm.remote()
        yield


@contextlib.contextmanager
def starting(session: AbstractContextManager[None]) -> Iterator[Callable[[], None]]:
    """Enter a `ray_session` in the background; yields a function that waits for it, and raises what it raised.

    The system kills Ray's daemons when the thread that started them ends, so that thread lasts as long as the block.
    """
    with ThreadPoolExecutor(1, "ray") as thread:
        joined = thread.submit(session.__enter__)
        try:
            yield joined.result
        finally:
            if joined.exception() is None:
                thread.submit(session.__exit__, None, None, None).result()


def _not_joined(error: Exception) -> tuple[str, str]:
    text = " ".join(str(error).split())
    if isinstance(error, AuthenticationError):
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        return "the cluster refuses the token, or the lack of one", remedy
    if "Version mismatch" in text:
        versions = text.partition("Version mismatch: ")[2]
        return f"another version of Ray or Python ({versions[:200]})", "install the cluster's versions here"
    return f"no Ray cluster answers ({text[:200]})", "start one with: ray start --head"


def _temporary_folder() -> tuple[str, str]:
    """The variable that sets a local cluster's folder for sockets and logs, and the folder."""
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


@contextlib.contextmanager
def own_dashboard() -> Iterator[None]:
    """Point Ray's state API at the dashboard of this cluster only.

    A cluster without a dashboard still announces Ray's default address, where another cluster's dashboard may listen,
    and `ray job submit` may set one in the environment. Such a dashboard reports the run as unknown, and Ray Train
    then removes its workers.
    """
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    # Without a dashboard an address that refuses every connection: TCP port 1 is reserved.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{get_webui_url_from_internal_kv() or '127.0.0.1:1'}"
    try:
        yield
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _check_dashboard() -> None:
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
        # An IPv6 address is in brackets.
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = f"no Ray cluster answers ({(error.strerror or str(error)).lower()})"
        raise UnavailableError("scaling.address", address, reason, "start one with: ray start --head") from error
