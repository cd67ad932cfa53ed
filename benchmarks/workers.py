"""One worker versus two with gloo, one core each, and the bytes and time of their communication."""

import gc
import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.spawn import spawn

from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.timing import Spread, take_turns
from benchmarks.workloads import CPU_WORKLOADS, FullStep, Workload
from tla_service.runtime import WorkerContext, keep_freed_memory

WORLD = 2
_CPU = torch.device("cpu")
_SAME, _HALF = "two workers, same batch each", "two workers, half the batch each"
_LATE = "two workers, reduction after the backward pass"
# What the machine itself costs two processes: caches, memory and clock are common, and nothing is said.
_APART = "two independent processes, same batch each"
_LEAST_SECONDS = 12.0  # of turns: short ones need many for a firm median
_REDUCTIONS = 20  # a small network's takes a millisecond
_BARS = {_SAME: 2 / 1.85}


def measure_scaling(work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """Weak and strong scaling from one process to two, and the bytes of a step and their time."""
    rows, sent = [], []
    for key, workload in work.items():
        if not workload.has_all_stages:
            continue
        with tempfile.TemporaryDirectory(prefix="tla-benchmark-") as folder:
            spawn(_worker, args=(key, settings.rounds, folder), nprocs=WORLD)
            found = json.loads((Path(folder) / "found.json").read_text())
        alone = found["wall"]["one worker"]
        for name in (_SAME, _APART, _HALF):
            slower = [two / one for two, one in zip(found["wall"][name], alone, strict=True)]
            spread = Spread.of(slower)
            faster = (1 if name == _HALF else WORLD) / spread.median
            rows.append([workload.name, name, f"{faster:.2f}", str(spread)])
            bar = _BARS.get(name)
            results.ratio(f"cpu {key}: {name}, step time over one worker's", spread, bar)
        sent.append([workload.name, *(f"{found[part]:,}" for part in ("attack bytes", "step bytes", "buckets"))])
        reduction = Spread.of([1000 * seconds for seconds in found["reduction"]])
        late = [late / same for late, same in zip(found["wall"][_LATE], found["wall"][_SAME], strict=True)]
        sent[-1] += [str(reduction), str(Spread.of(late))]
        results.raw[f"scaling {key}"] = found
    results.table("Scaling", ["network", "workers", "speed-up over one", "step time over one worker's"], rows)
    columns = ["network", "bytes reduced in the attack", "bytes reduced in the update", "buckets"]
    columns += ["reduction alone, ms (quartiles)", "step with it after the backward pass, over during (quartiles)"]
    results.table("Communication", columns, sent)


def _worker(rank: int, key: str, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(minutes=5)
    )
    try:
        found = _measured(rank, CPU_WORKLOADS[key], rounds)
        if rank == 0:
            (Path(folder) / "found.json").write_text(json.dumps(found))
    finally:
        # DDP wrappers hold the group in cycles; one that is left when the interpreter ends aborts it.
        gc.collect()
        dist.destroy_process_group()


def _measured(rank: int, workload: Workload, rounds: int) -> dict[str, Any]:
    """Turns of one worker, during which the other sleeps, and of both together; rank 0's times."""
    context = WorkerContext(rank, WORLD, _CPU)
    alone, apart = FullStep(workload, WorkerContext()), FullStep(workload, WorkerContext())
    larger = {"global_batch_size": WORLD * workload.batch_size}
    same, half = FullStep(workload, context, training=larger), FullStep(workload, context)
    late = FullStep(workload, context, training=larger, speed={"overlap_reduction": False})
    steps = {"one worker": alone, _SAME: same, _APART: apart, _HALF: half, _LATE: late}

    def turn(step: FullStep) -> None:
        if step is not alone or rank == 0:
            step()
        if step is apart:
            dist.barrier()  # the slower of the two counts, as it does for workers that wait for each other

    def lone_turn(step: FullStep) -> dict[str, list[float]]:
        dist.barrier()
        return take_turns({"": lambda: turn(step)}, rounds=1, burn_in=0).wall

    once = torch.tensor([sum(lone_turn(step)[""][0] for step in steps.values())])
    dist.broadcast(once, 0)  # both take as many rounds
    rounds = max(rounds, int(_LEAST_SECONDS / float(once)))
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wall[name] += lone_turn(step)[""]
    attack, update = _bytes_reduced(workload, context)
    counts = {"attack bytes": sum(attack), "step bytes": sum(update), "buckets": len(attack) + len(update)}
    return {"wall": wall, "reduction": _reduction_alone(update, rounds), **counts}


def _reduction_alone(buckets: list[int], rounds: int) -> list[float]:
    """Seconds of an all-reduce of buckets of these sizes, without concurrent computation."""
    gradients = [torch.zeros(num_bytes // 4) for num_bytes in buckets]

    def reduce() -> None:
        for bucket in gradients:
            dist.all_reduce(bucket)

    return take_turns({"": reduce}, rounds=max(rounds, _REDUCTIONS), burn_in=3).wall[""]


def _bytes_reduced(workload: Workload, context: WorkerContext) -> tuple[list[int], list[int]]:
    """Bytes of each all-reduced bucket: in an attack, and in a whole step."""
    step = FullStep(workload, context)
    step()
    seen: list[int] = []

    def hook(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    assert isinstance(step.step.wrapped, torch.nn.parallel.DistributedDataParallel)
    step.step.wrapped.register_comm_hook(dist.group.WORLD, hook)
    step.adversary.craft(step.next_batch().anchors, torch.Generator())
    attack = list(seen)
    step()
    return attack, seen[len(attack) :]
