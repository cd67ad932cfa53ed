"""One worker against two on gloo, one core each, and what they send each other."""

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

from tla_service.benchmark.results import Results
from tla_service.benchmark.settings import BenchmarkSettings
from tla_service.benchmark.timing import Spread, take_turns
from tla_service.benchmark.workloads import CPU_WORKLOADS, FullStep, Workload
from tla_service.runtime import WorkerContext

WORLD = 2
_CPU = torch.device("cpu")
_BARS = {"two workers, same batch each": 2 / 1.85}


def measure_scaling(work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """Weak and strong scaling from one process to two, and the bytes of a step."""
    rows, sent = [], []
    for key, workload in work.items():
        if workload.num_steps > 10:
            continue
        with tempfile.TemporaryDirectory(prefix="tla-benchmark-") as folder:
            spawn(_worker, args=(key, settings.rounds, folder), nprocs=WORLD)
            found = json.loads((Path(folder) / "found.json").read_text())
        alone = found["wall"]["one worker"]
        for name in ("two workers, same batch each", "two workers, half the batch each"):
            weak = name.startswith("two workers, same")
            slower = [two / one for two, one in zip(found["wall"][name], alone, strict=True)]
            spread = Spread.of(slower)
            faster = (WORLD if weak else 1) / spread.median
            rows.append([workload.name, name, f"{faster:.2f}", str(spread)])
            bar = _BARS.get(name)
            results.ratio(f"cpu {key}: {name}, step time over one worker's", spread, bar)
        sent.append([workload.name, *(f"{found[part]:,}" for part in ("attack bytes", "step bytes", "buckets"))])
        results.raw[f"scaling {key}"] = found
    results.table("Scaling", ["network", "workers", "speed-up over one", "step time over one worker's"], rows)
    columns = ["network", "bytes reduced in the attack", "bytes reduced in the update", "buckets"]
    results.table("Communication", columns, sent)


def _worker(rank: int, key: str, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
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
        dist.destroy_process_group()


def _measured(rank: int, workload: Workload, rounds: int) -> dict[str, Any]:
    """Turns of one worker, during which the other sleeps, and of both together; rank 0's times."""
    context = WorkerContext(rank, rank, WORLD, _CPU)
    alone = FullStep(workload, WorkerContext())
    same = FullStep(workload, context, training={"global_batch_size": WORLD * workload.batch_size})
    half = FullStep(workload, context)
    late = FullStep(
        workload,
        context,
        training={"global_batch_size": WORLD * workload.batch_size},
        speed={"overlap_reduction": False},
    )
    steps = {
        "one worker": alone,
        "two workers, same batch each": same,
        "two workers, half the batch each": half,
        "two workers, reduction after the backward pass": late,
    }

    def turn(step: FullStep) -> None:
        if step is not alone or rank == 0:
            step()

    def lone_turn(step: FullStep) -> dict[str, list[float]]:
        dist.barrier()
        return take_turns({"": lambda: turn(step)}, rounds=1, burn_in=0).wall

    for step in steps.values():
        lone_turn(step)
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wall[name] += lone_turn(step)[""]
    return {"wall": wall, **_counted(workload, context)}


def _counted(workload: Workload, context: WorkerContext) -> dict[str, int]:
    """Bytes and buckets that go through all-reduce in one step, and how many of them during the attack."""
    step = FullStep(workload, context)
    step()
    counts = {"bytes": 0, "buckets": 0}

    def hook(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        counts["bytes"] += bucket.buffer().nbytes
        counts["buckets"] += 1
        return allreduce_hook(group, bucket)

    assert isinstance(step.step.wrapped, torch.nn.parallel.DistributedDataParallel)
    step.step.wrapped.register_comm_hook(dist.group.WORLD, hook)
    step.adversary.craft(step.next_batch().anchors, torch.Generator())
    attack = counts["bytes"]
    step()
    return {"attack bytes": attack, "step bytes": counts["bytes"] - attack, "buckets": counts["buckets"]}
