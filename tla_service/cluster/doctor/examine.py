"""Runs the checks from the driver, and judges their results."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tla_service.cluster.doctor import node
from tla_service.cluster.doctor.settings import CheckupSettings
from tla_service.cluster.mailbox import reason_line
from tla_service.cluster.placement import place
from tla_service.cluster.session import ray_session
from tla_service.cluster.storage import RunFolder
from tla_service.config import RunConfig
from tla_service.errors import UserError, without_credentials
from tla_service.files import expanded
from tla_service.tracking.connection import probe_tracking, tracking_uri

_MOST_WORKERS = 1024  # of `auto`
GIB, MB = 2**30, 10**6
_LEAST_SHARED_MEMORY, _LEAST_CACHE = 1 * GIB, 10 * GIB
_SLOW_STORAGE = 20.0  # MB/s; checkpoints of a large network would delay training
_SLOW_NCCL = 1.0  # GB/s; NCCL probably uses the wrong network interface
_RESTART = "see raylet.log on this node; restart it"
_CLOCK_WARN_SECONDS, _CLOCK_FAIL_SECONDS = 2.0, 300.0  # S3 refuses requests that are 15 minutes off


class Finding(NamedTuple):
    """Of a check on a node (its address), the driver or the workers; `warn` degrades training, `FAIL` would stop it."""

    check: str
    where: str
    state: Literal["ok", "note", "warn", "FAIL"]
    detail: str
    remedy: str = ""


class Node(NamedTuple):
    """A node of the cluster; `gpus` is what it declares to Ray."""

    id: str
    address: str
    gpus: int

    def judge(self, check: str, detail: str, *, fail: str = "", warn: str = "") -> Finding:
        """The finding of a check: ok, unless a remedy is given."""
        return Finding(check, self.address, "FAIL" if fail else "warn" if warn else "ok", detail, fail or warn)


def table(findings: Sequence[Finding]) -> str:
    """The findings in columns, each followed by its remedy."""
    widths = [max(len(getattr(finding, name)) for finding in findings) for name in ("check", "where")]
    lines = []
    for check, where, state, detail, remedy in findings:
        lines.append(f"{check:<{widths[0]}}  {where:<{widths[1]}}  {state:<4}  {detail}")
        if remedy:
            lines.append(f"{'':{sum(widths) + 10}}-> {remedy}")
    return "\n".join(lines)


def verdict(findings: Sequence[Finding]) -> str:
    """A summary in one line."""
    failed, warned = (sum(finding.state == state for finding in findings) for state in ("FAIL", "warn"))
    return f"{failed} checks failed, {warned} warnings" if failed or warned else "all checks passed"


def examine(settings: CheckupSettings) -> Iterator[Finding]:
    """Connect to or start the cluster and run all checks; raises `UserError` if the configured one is not there."""
    expanded("data.cache_dir", settings.data.cache_dir)  # refuses an unknown user
    yield tracking(settings)
    with ray_session(settings.scaling):
        alive = [entry for entry in ray.nodes() if entry["Alive"]]
        nodes = [Node(e["NodeID"], e["NodeManagerAddress"], int(e["Resources"].get("GPU", 0))) for e in alive]
        nodes.sort(key=lambda found: (found.address, found.id))
        yield Finding("nodes", "driver", "ok", f"{len(nodes)} alive")
        yield from token(len(nodes))
        for found in nodes:
            told = _facts(found, settings)
            if isinstance(told, str):
                yield found.judge("node", told, fail=_RESTART)
                continue
            yield versions(found, told["versions"])
            yield shared_memory(found, told, settings)
            yield cache(found, told["cache_free"], str(settings.data.cache_dir))
            yield clock(found, told["clock_seconds"])
            if settings.data.root is not None:
                data = told["data"]
                yield Finding("data.root", found.address, "FAIL" if data else "ok", data or settings.data.root)
            yield gpus(found, settings)
            yield storage(found, settings)
        yield workers(settings)


def tracking(settings: CheckupSettings) -> Finding:
    """MLflow, which only the driver writes to."""
    uri = without_credentials(tracking_uri(settings.tracking))
    try:
        seconds = probe_tracking(settings.tracking)
    except UserError as error:
        return Finding("MLflow", "driver", "FAIL", f"{uri}: {error.reason}", error.remedy)
    return Finding("MLflow", "driver", "ok", f"{uri}: stored a run with a file in {seconds:.1f} s")


def token(count: int) -> Iterator[Finding]:
    """Whether the cluster requires a token; a single machine need not."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        yield Finding("token", "driver", "ok", "RAY_AUTH_MODE=token")
    elif count > 1:
        remedy = "export RAY_AUTH_MODE=token on every node: anyone who reaches the head's ports can run code"
        yield Finding("token", "driver", "warn", "the cluster requires no token", remedy)


def versions(found: Node, told: dict[str, str]) -> Finding:
    """Every node against the driver; GPU drivers may differ."""
    own = node.versions()
    apart = [
        f"{name} {told[name]}, driver has {own[name]}" for name in own if name != "driver" and told[name] != own[name]
    ]
    if apart:
        remedy = "use one image, or one requirements.lock, on every node"
        return found.judge("versions", "; ".join(apart), fail=remedy)
    text = ", ".join(f"{name} {told[name]}" for name in ("python", "ray", "torch", "cuda", "mlflow", "tla-service"))
    return found.judge("versions", f"{text}; GPU driver {told['driver']}")


def shared_memory(found: Node, told: dict[str, Any], settings: CheckupSettings) -> Finding:
    """Shared memory, which data loaders and Ray use."""
    free, error = told["shared_memory"], told["shared_memory_error"]
    detail = f"{free / GIB:.1f} GiB free"
    remedy = "docker: --shm-size; Kubernetes: an emptyDir of medium Memory at /dev/shm"
    if error:
        return found.judge("shared memory", f"{detail}: {error}", fail=remedy)
    detail += f", {settings.megabytes} MB written"
    if free < _LEAST_SHARED_MEMORY:
        return found.judge("shared memory", f"{detail}; data loaders need more", warn=remedy)
    return found.judge("shared memory", detail)


def cache(found: Node, free: int, folder: str) -> Finding:
    """The disk of the data cache."""
    remedy = "set data.cache_dir to a larger disk" if free < _LEAST_CACHE else ""
    return found.judge("cache", f"{free / GIB:.0f} GiB free at {folder}", warn=remedy)


def clock(found: Node, offset: float | str) -> Finding:
    """A node's clock against the driver's, up to the latency of the call; or why that is not known."""
    if isinstance(offset, str):
        return found.judge("clock", offset, fail=_RESTART)
    detail, remedy = f"{offset:+.2f} s from the driver's", "run an NTP service on every node"
    if abs(offset) >= _CLOCK_FAIL_SECONDS:
        return found.judge("clock", detail, fail=remedy)
    return found.judge("clock", detail, warn=remedy if abs(offset) >= _CLOCK_WARN_SECONDS else "")


def gpus(found: Node, settings: CheckupSettings) -> Finding:
    """Matrix products on every GPU of the node; waits until they are free."""
    if not found.gpus:
        return Finding("GPUs", found.address, "note", "none")
    told = _on_node(found, node.use_gpus, settings.timeout_seconds, num_gpus=found.gpus)
    if isinstance(told, str):
        return found.judge("GPUs", told, fail="run nvidia-smi on the node; check whether another job holds the GPUs")
    if len(told) != found.gpus:
        remedy = "check the driver and the container toolkit, and that torch in the image has CUDA"
        return found.judge("GPUs", f"Ray counts {found.gpus}, torch sees {len(told)}", fail=remedy)
    return found.judge("GPUs", ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in told))


def storage(found: Node, settings: CheckupSettings) -> Finding:
    """An object written to and read from the checkpoint storage, which has to be the driver's."""
    uri = settings.scaling.storage
    if uri is None:
        detail = "scaling.storage is not set; set it to s3://bucket/prefix, or a folder that all nodes share"
        return Finding("storage", found.address, "note", detail)
    try:
        folder = RunFolder(uri, "")
        token = folder.mark()
        told = _on_node(found, node.use_storage, settings.timeout_seconds, folder.uri, settings.megabytes * MB, token)
        folder.delete(RunFolder.ATTEMPT)
    except UserError as error:
        return Finding("storage", "driver", "FAIL", error.reason, error.remedy)
    if isinstance(told, str):
        remedy = "check the bucket, the credentials and AWS_ENDPOINT_URL_S3; a folder has to be shared by all nodes"
        return found.judge("storage", told, fail=remedy)
    write, read = (settings.megabytes / seconds for seconds in told)
    remedy = "use storage in the same region, or an endpoint within the network"
    slow = remedy if min(write, read) < _SLOW_STORAGE else ""
    return found.judge("storage", f"{uri}: {write:.0f} MB/s written, {read:.0f} MB/s read", warn=slow)


def workers(settings: CheckupSettings) -> Finding:
    """An all-reduce over workers that are placed as in a run, of which each has two images."""
    scaling = settings.scaling
    if settings.workers is not None:
        scaling = scaling.model_copy(update={"num_workers": settings.workers})
    try:
        batch = {"global_batch_size": 2 * scaling.bounds(auto=_MOST_WORKERS)[1]}
        placement = place(RunConfig.model_validate({"method": "at", "training": batch, "scaling": scaling}))
        told = node.use_workers(placement, settings.megabytes * MB, settings.timeout_seconds)
    except UserError as error:
        return Finding("all-reduce", "workers", "FAIL", f"{error.subject}: {error.reason}", error.remedy)
    except Exception as error:  # noqa: BLE001 - any error is the finding
        remedy = "check that no other job holds the resources, and that firewalls open all ports between nodes; set "
        remedy += "NCCL_DEBUG=INFO on every node"
        return Finding("all-reduce", "workers", "FAIL", reason_line(error)[:300], remedy)
    rate, backend = told["gigabytes_per_second"], told["backend"]
    detail = f"{backend}, {placement.num_workers} workers: {settings.megabytes} MB in {told['seconds']:.3f} s"
    detail += f", {rate:.2f} GB/s"
    if backend == "nccl" and placement.num_workers > 1 and rate < _SLOW_NCCL:
        remedy = "NCCL_DEBUG=INFO shows the network interface; set NCCL_SOCKET_IFNAME"
        return Finding("all-reduce", "workers", "warn", detail, remedy)
    return Finding("all-reduce", "workers", "ok", detail)


def _facts(found: Node, settings: CheckupSettings) -> dict[str, Any] | str:
    """The facts of a node, or why it does not respond."""
    timeout = settings.timeout_seconds
    told = _on_node(found, node.facts, timeout, settings.data.root, settings.data.cache_dir)
    if not isinstance(told, str):
        # After the first call, whose imports would look like a wrong clock.
        before = time.time()
        now = _on_node(found, time.time, timeout)
        told["clock_seconds"] = now if isinstance(now, str) else now - (before + time.time()) / 2
        told["shared_memory_error"] = _on_node(found, node.use_shared_memory, timeout, settings.megabytes * MB)
    return told


def _on_node(found: Node, call: Callable[..., Any], seconds: float, *arguments: Any, num_gpus: int = 0) -> Any:
    """Call a function on a node; returns the error as text if that fails."""
    here = NodeAffinitySchedulingStrategy(found.id, soft=False)
    task = ray.remote(lambda: call(*arguments))
    answer = task.options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=here, max_retries=0).remote()
    try:
        return ray.get(answer, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(answer, force=True)
        return f"no response within {seconds:.0f} s"
    except RayError as error:
        cause = getattr(error, "cause", None)
        return cause.reason if isinstance(cause, UserError) else reason_line(error)[:300]
