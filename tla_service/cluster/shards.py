"""Measurements on Ray: shards go to workers as tasks; a shard that was saved before is not measured again."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError, WorkerCrashedError

from tla_service.config import ScalingConfig
from tla_service.data import Dataset
from tla_service.errors import UnavailableError
from tla_service.evaluation.outcomes import Arrays, load_arrays, save_arrays
from tla_service.models import build_model
from tla_service.report.tasks import Measurement, Rows, Shard, Task, shard_file
from tla_service.runtime import keep_freed_memory

_AHEAD = 2  # shards in flight per slot: one measured, one waiting; more would only hold images in memory


@dataclass(frozen=True)
class NetworkSource:
    """What a worker builds a network from.

    Attributes:
        architecture: Its name.
        num_classes: K.
        image_shape: (C, H, W).
        normalization: Input normalisation inside the network.
        weights: State dict, on the CPU.
    """

    architecture: str
    num_classes: int
    image_shape: tuple[int, int, int]
    normalization: str
    weights: Mapping[str, torch.Tensor]

    def build(self, device: torch.device) -> torch.nn.Module:
        """The network, in eval mode."""
        network = build_model(self.architecture, self.num_classes, self.image_shape, self.normalization)
        network.load_state_dict(dict(self.weights))
        return network.to(device).eval()


@dataclass(frozen=True)
class Slots:
    """Room for shards on the cluster.

    Attributes:
        count: Shards measured at a time.
        cpus: CPU cores that each reserves.
        gpus: GPU share that each reserves.
        crashes: How often a shard whose worker dies is given to another.
    """

    count: int
    cpus: float
    gpus: float
    crashes: int

    def __str__(self) -> str:
        """For people."""
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus:g} CPU core" + ("s" if self.cpus != 1 else "")
        return f"{self.count} worker{'s' if self.count != 1 else ''}, {each} each"


def find_slots(scaling: ScalingConfig) -> Slots:
    """Decide how many shards are measured at a time.

    Raises:
        UnavailableError: No node has room for one; the message shows the arithmetic.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    use_gpu = any(node.get("GPU", 0) for node in nodes) if scaling.use_gpu == "auto" else scaling.use_gpu
    share = {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if use_gpu else {})
    room = sum(int(min(node.get(name, 0.0) / need for name, need in share.items())) for node in nodes)
    if room == 0:
        needs = " and ".join(f"{need:g} {name}s" for name, need in share.items())
        largest = ", ".join(f"{max((node.get(name, 0.0) for node in nodes), default=0):g} {name}s" for name in share)
        reason = f"a worker needs {needs}; the largest node has {largest}"
        raise UnavailableError("scaling", None, reason, "ask for less, or join a larger cluster")
    asked = scaling.num_workers if isinstance(scaling.num_workers, int) else room
    return Slots(min(asked, room), share["CPU"], share.get("GPU", 0.0), scaling.max_failures)


def run_tasks(
    tasks: Sequence[Task],
    networks: Mapping[str, NetworkSource],
    surrogate: NetworkSource | None,
    dataset: Dataset,
    folder: Path,
    slots: Slots,
    say: Callable[[str], None],
) -> dict[tuple[str, str], Any]:
    """Measure, shard by shard.

    At any time `slots` allows, shards are in flight, and their images in memory: not the whole set.

    Args:
        tasks: What to measure.
        networks: By the tasks' `model`.
        surrogate: For transfer attacks.
        dataset: Where the images are.
        folder: Shards are saved under ``shards/`` as they come in, and taken from there when they are there.
        slots: Room on the cluster.
        say: Told of progress.

    Returns:
        Merged results by (model, task name).

    Raises:
        UserError: A network or a set does not fit.
        UnavailableError: A shard's worker died more often than allowed.
    """
    missing = _missing(tasks, folder)
    if missing:
        total = sum(1 for task in tasks for _ in task.shards())
        done = total - len(missing)
        say(f"{len(missing)} shards to measure" + (f", {done} taken from before" if done else ""))
        _run_missing(missing, networks, surrogate, dataset, folder, slots, say)
    results = {}
    for task in tasks:
        parts = [load_arrays(shard_file(folder, name)) for name, _ in task.shards()]
        results[task.key] = task.measurement.merge(parts)
    return results


def _missing(tasks: Sequence[Task], folder: Path) -> list[tuple[Task, str, Rows]]:
    """Shards without a file that can be read; a damaged one counts as missing."""
    missing = []
    for task in tasks:
        for name, rows in task.shards():
            try:
                load_arrays(shard_file(folder, name))
            except UnavailableError:
                missing.append((task, name, rows))
    return missing


def _run_missing(
    missing: Sequence[tuple[Task, str, Rows]],
    networks: Mapping[str, NetworkSource],
    surrogate: NetworkSource | None,
    dataset: Dataset,
    folder: Path,
    slots: Slots,
    say: Callable[[str], None],
) -> None:
    sources = {model: ray.put(source) for model, source in networks.items()}
    transfer = ray.put(surrogate)
    measure = ray.remote(_measure).options(
        num_cpus=slots.cpus, num_gpus=slots.gpus, max_retries=slots.crashes, retry_exceptions=False
    )
    waiting = list(reversed(missing))
    flying: dict[Any, tuple[Task, str]] = {}
    finished = 0
    while waiting or flying:
        while waiting and len(flying) < _AHEAD * slots.count:
            task, name, rows = waiting.pop()
            source = dataset.train if task.split == "train" else dataset.test
            chosen = torch.from_numpy(rows)
            images, labels = source.fetch(chosen), source.labels[chosen]
            reference = measure.remote(task.measurement, sources[task.model], transfer, images, labels, rows)
            flying[reference] = (task, name)
        ready, _ = ray.wait(list(flying), num_returns=1)
        for reference in ready:
            task, name = flying.pop(reference)
            save_arrays(_result(reference, name), shard_file(folder, name))
            finished += 1
            say(f"{finished}/{len(missing)}  {task.name}")


def _result(reference: Any, name: str) -> Arrays:
    try:
        arrays: Arrays = ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error  # what the measurement itself raised
    except WorkerCrashedError as error:
        remedy = "look for want of memory; the same command goes on from the shards that are there"
        raise UnavailableError("shard", name, "its worker died more often than scaling.max_failures", remedy) from error
    return arrays


def _measure(
    measurement: Measurement,
    source: NetworkSource,
    surrogate: NetworkSource | None,
    images: torch.Tensor,
    labels: torch.Tensor,
    rows: Rows,
) -> Arrays:
    """One shard, in a worker."""
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        keep_freed_memory()
    other = surrogate.build(device) if surrogate is not None else None
    # Arrays that Ray hands out are read-only, which torch warns of.
    shard = Shard(images.clone(), labels.clone(), rows.copy(), device)
    return measurement.run(source.build(device), other, shard)
