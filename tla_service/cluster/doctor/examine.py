"""The check-up, from the driver: one task a node for each question, judged here."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tla_service.cluster.doctor import collective, node
from tla_service.cluster.doctor.finding import Finding
from tla_service.cluster.doctor.settings import CheckupSettings
from tla_service.cluster.session import place, ray_session
from tla_service.config import RunConfig
from tla_service.errors import UserError
from tla_service.tracking.connection import tracking_uri
from tla_service.tracking.probe import probe_tracking

GIB, MB = 2**30, 10**6
LEAST_SHARED_MEMORY, LEAST_CACHE = 1 * GIB, 10 * GIB
SLOW_STORAGE = 20.0  # MB/s: below this a checkpoint of a large network holds training up
SLOW_NCCL = 1.0  # GB/s: below this NCCL goes over a network that is not meant for it
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 2.0, 300.0  # S3 refuses requests that are 15 minutes off


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its id, address, and whether it is this driver's; GPUs it declares."""

    id: str
    address: str
    gpus: int


def examine(settings: CheckupSettings) -> Iterator[Finding]:
    """Join or start the cluster and try everything, one finding after another.

    Raises:
        UserError: There is no cluster at the address given.
    """
    config = RunConfig(scaling=settings.scaling, tracking=settings.tracking)
    yield from tracking(settings)
    with ray_session(config):
        nodes = sorted(
            (
                Node(entry["NodeID"], entry["NodeManagerAddress"], int(entry["Resources"].get("GPU", 0)))
                for entry in ray.nodes()
                if entry["Alive"]
            ),
            key=lambda found: (found.address, found.id),
        )
        yield Finding("nodes", "driver", "ok", f"{len(nodes)} alive")
        yield from token(len(nodes))
        known = dict(_ask_for_facts(nodes, settings))
        for found in nodes:
            told = known[found.id]
            if isinstance(told, str):
                yield Finding("node", found.address, "FAIL", told, "look into this node's raylet.log; restart it")
                continue
            yield from versions(found, told["versions"])
            yield from memory(found, told, settings)
            yield clock(found, told["clock_seconds"])
            if settings.data.root is not None:
                data = told["data"]
                yield Finding("data.root", found.address, "FAIL" if data else "ok", data or settings.data.root)
            yield from gpus(found, settings)
            yield from storage(found, settings)
        yield from workers(config, settings)


def tracking(settings: CheckupSettings) -> Iterator[Finding]:
    """MLflow, from here: it is the driver that writes to it."""
    uri = tracking_uri(settings.tracking)
    shown = f"{uri.partition('://')[0]}://{uri.partition('://')[2].rpartition('@')[2]}"
    try:
        seconds = probe_tracking(settings.tracking)
        yield Finding("MLflow", "driver", "ok", f"{shown}: a run with a file, made and deleted in {seconds:.1f} s")
    except UserError as error:
        yield Finding("MLflow", "driver", "FAIL", f"{shown}: {error.reason}", error.remedy)


def token(count: int) -> Iterator[Finding]:
    """Whether the cluster asks for a token; one machine by itself need not."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        yield Finding("token", "driver", "ok", "RAY_AUTH_MODE=token")
    elif count > 1:
        remedy = "export RAY_AUTH_MODE=token on every node: whoever reaches the head's ports can run code"
        yield Finding("token", "driver", "warn", "the cluster asks for no token", remedy)


def versions(found: Node, told: dict[str, str]) -> Iterator[Finding]:
    """Every node against the driver; a GPU driver differs from node to node and is only told."""
    own = node.facts(None, "/")["versions"]
    apart = [
        f"{name} {told[name]}, driver has {own[name]}" for name in own if name != "driver" and told[name] != own[name]
    ]
    if apart:
        remedy = "one image, or one requirements.lock, on every node"
        yield Finding("versions", found.address, "FAIL", "; ".join(apart), remedy)
    else:
        text = ", ".join(f"{name} {told[name]}" for name in ("python", "ray", "torch", "cuda", "mlflow", "tla-service"))
        yield Finding("versions", found.address, "ok", f"{text}; GPU driver {told['driver']}")


def memory(found: Node, told: dict[str, Any], settings: CheckupSettings) -> Iterator[Finding]:
    """Shared memory, which loaders and Ray use, and the disk of the cache."""
    free = told["shared_memory"]
    refused = told["shared_memory_refused"]
    detail = f"{free / GIB:.1f} GiB free, {settings.megabytes} MB written"
    remedy = "docker: --shm-size; Kubernetes: an emptyDir of medium Memory at /dev/shm"
    if refused:
        yield Finding("shared memory", found.address, "FAIL", f"{free / GIB:.1f} GiB free: {refused}", remedy)
    elif free < LEAST_SHARED_MEMORY:
        yield Finding("shared memory", found.address, "warn", f"{detail}; loaders need more", remedy)
    else:
        yield Finding("shared memory", found.address, "ok", detail)
    free = told["cache_free"]
    state, remedy = ("ok", "") if free >= LEAST_CACHE else ("warn", "data.cache_dir on a larger disk")
    yield Finding("cache", found.address, state, f"{free / GIB:.0f} GiB free at {settings.data.cache_dir}", remedy)  # type: ignore[arg-type]


def clock(found: Node, apart: float) -> Finding:
    """A node's clock against the driver's, within the time that asking took."""
    detail, remedy = f"{apart:+.2f} s from the driver's", "run an NTP service on every node"
    if abs(apart) < CLOCK_WARN_SECONDS:
        return Finding("clock", found.address, "ok", detail)
    return Finding("clock", found.address, "warn" if abs(apart) < CLOCK_FAIL_SECONDS else "FAIL", detail, remedy)


def gpus(found: Node, settings: CheckupSettings) -> Iterator[Finding]:
    """Matrices multiplied on every GPU of the node; waits until they are free, within limits."""
    if not found.gpus:
        yield Finding("GPUs", found.address, "note", "none")
        return
    told = _on_node(found, node.use_gpus, settings.timeout_seconds, num_gpus=found.gpus)
    if isinstance(told, str):
        yield Finding("GPUs", found.address, "FAIL", told, "nvidia-smi on the node; are they taken by another job?")
    elif len(told) != found.gpus:
        remedy = "the driver, or the container toolkit; torch without CUDA in the image"
        yield Finding("GPUs", found.address, "FAIL", f"Ray counts {found.gpus}, torch sees {len(told)}", remedy)
    else:
        text = ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in told)
        yield Finding("GPUs", found.address, "ok", text)


def storage(found: Node, settings: CheckupSettings) -> Iterator[Finding]:
    """An object written and read from the node, where checkpoints go."""
    place_ = settings.scaling.storage
    if place_ is None:
        remedy = "set scaling.storage to s3://bucket/prefix, or a folder that all nodes share"
        yield Finding("storage", found.address, "note", f"scaling.storage is not set; {remedy}")
        return
    told = _on_node(found, node.use_storage, settings.timeout_seconds, place_, settings.megabytes * MB)
    if isinstance(told, str):
        yield Finding("storage", found.address, "FAIL", told, "check bucket, credentials and AWS_ENDPOINT_URL_S3")
        return
    write, read = (settings.megabytes / seconds for seconds in told)
    slow = min(write, read) < SLOW_STORAGE
    remedy = "a store in the same region, an endpoint within the network" if slow else ""
    detail = f"{place_}: {write:.0f} MB/s written, {read:.0f} MB/s read"
    yield Finding("storage", found.address, "warn" if slow else "ok", detail, remedy)


def workers(config: RunConfig, settings: CheckupSettings) -> Iterator[Finding]:
    """Sums over workers, placed as a run's would be."""
    if settings.workers is not None:
        config = RunConfig(scaling=settings.scaling.model_copy(update={"num_workers": settings.workers}))
    name = f"checkup-{uuid.uuid4().hex[:8]}"
    scratch = tempfile.mkdtemp(prefix="tla-checkup-")
    try:
        placement = place(config)
        # Nothing is reported, so nothing is stored but Ray's own small files: a shared place is needed for those alone.
        told = collective.measure(
            placement, settings.megabytes * MB, settings.scaling.storage or scratch, name, settings.timeout_seconds
        )
    except UserError as error:
        yield Finding("all-reduce", "workers", "FAIL", f"{error.subject}: {error.reason}", error.remedy)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
        reason = str(error).strip().splitlines()[-1][:300]
        remedy = "NCCL_DEBUG=INFO on every node; do firewalls let nodes speak on all ports?"
        yield Finding("all-reduce", "workers", "FAIL", reason, remedy)
    else:
        rate, backend = told["gigabytes_per_second"], told["backend"]
        slow = backend == "nccl" and placement.num_workers > 1 and rate < SLOW_NCCL
        detail = f"{backend}, {placement.num_workers} workers: {settings.megabytes} MB in {told['seconds']:.3f} s"
        remedy = "NCCL_DEBUG=INFO shows the network it took; set NCCL_SOCKET_IFNAME" if slow else ""
        yield Finding("all-reduce", "workers", "warn" if slow else "ok", f"{detail}, {rate:.2f} GB/s", remedy)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _forget(settings.scaling.storage, name)


def _forget(storage_: str | None, name: str) -> None:
    """Delete what Ray wrote about the workers."""
    if storage_ is None:
        return
    from pyarrow.fs import FileSystem

    filesystem, root = FileSystem.from_uri(storage_ if "://" in storage_ else Path(storage_).absolute().as_uri())
    try:
        filesystem.delete_dir(f"{root}/{name}")
    except OSError:
        return


def _ask_for_facts(nodes: list[Node], settings: CheckupSettings) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Facts of every node; a reason in their place where it does not answer."""
    for found in nodes:
        asked = (settings.data.root, settings.data.cache_dir)
        told = _on_node(found, node.facts, settings.timeout_seconds, *asked)  # the first pays for imports
        if not isinstance(told, str):
            before = time.time()
            now = _on_node(found, time.time, settings.timeout_seconds)
            told["clock_seconds"] = now - (before + time.time()) / 2 if not isinstance(now, str) else 0.0
            size = settings.megabytes * MB
            told["shared_memory_refused"] = _on_node(found, node.use_shared_memory, settings.timeout_seconds, size)
        yield found.id, told


def _on_node(found: Node, call: Callable[..., Any], seconds: float, *arguments: Any, num_gpus: int = 0) -> Any:
    """Call a function on a node; the reason, as text, when that fails."""
    here = NodeAffinitySchedulingStrategy(found.id, soft=False)

    def work(*given: Any) -> Any:
        return call(*given)

    task = ray.remote(work).options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=here, max_retries=0)
    answer = task.remote(*arguments)
    try:
        return ray.get(answer, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(answer, force=True)
        return f"no answer within {seconds:.0f} s"
    except RayError as error:
        return str(error).strip().splitlines()[-1][:300]
