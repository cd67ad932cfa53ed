"""Time per part of a training step."""

import time
from collections.abc import Iterator

import torch

from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.stages import context_of
from benchmarks.timing import Spread, synchronize
from benchmarks.workloads import FullStep, Workload
from tla_service.runtime import autocast, generator
from tla_service.triplets import mine_hardest

_MINING = "embed and mine alone (within the forward part)"


def measure_parts(work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """Time per part of a TLA step, each between two synchronizations."""
    rows = []
    for key, workload in work.items():
        step = FullStep(workload, context_of(settings))
        random, turns = generator(step.context.device, 0), dict[str, list[float]]()
        for turn in range(settings.rounds + 1):
            began = time.perf_counter()
            for name in _parts(step, random):
                synchronize()
                if turn:
                    turns.setdefault(name, []).append(time.perf_counter() - began)
                began = time.perf_counter()
        medians = {name: Spread.of(values).median for name, values in turns.items()}
        whole = sum(seconds for name, seconds in medians.items() if name != _MINING)
        for name, seconds in medians.items():
            rows.append([workload.name, name, f"{1000 * seconds:.1f}", f"{100 * seconds / whole:.1f} %"])
        results.raw[f"parts {key}"] = medians
    results.table("Parts", ["network", "part", "ms per step", "share"], rows)


def _parts(step: FullStep, random: torch.Generator) -> Iterator[str]:
    """Run a step; yields the name of each part after it has run."""
    batch = step.next_batch()
    yield "read and augment"
    images = step.adversary.craft(batch.anchors, random)
    yield "attack"
    step.optimizer.zero_grad(set_to_none=True)
    loss, totals = step.step.objective(batch, images, random)
    yield "forward, mining, loss"
    loss.backward()
    yield "backward"
    step.optimizer.step()
    yield "optimizer"
    step.meter.add(totals)
    yield "meter"
    with autocast(step.config.training.precision, step.context.device):
        (clean,) = step.step.wrapped(batch.anchors.images)
    embeddings, labels = clean.embeddings.detach(), batch.anchors.labels
    mine_hardest(embeddings, labels, embeddings, labels)
    yield _MINING
