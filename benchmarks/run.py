"""The benchmark from settings to output: the requested stages, then the regression check."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks import parts, stages, switches
from benchmarks.results import Results, facts, keep_ratios, read_ratios, read_results, worsened
from benchmarks.settings import CPU_STAGES, GPU_STAGES, BenchmarkSettings
from benchmarks.workloads import CPU_WORKLOADS, GPU_WORKLOADS, Workload
from tla_service.errors import ConfigError, UnavailableError
from tla_service.runtime import keep_freed_memory

# What a GPU is measured with; the parts that differ from the defaults are among its switches.
GPU_BASE: stages.Changes = {
    "training": {"precision": "bfloat16", "channels_last": True},
    "speed": {"tune_kernels": True, "cuda_graphs": True, "compile": "all"},
}


def run_benchmark(settings: BenchmarkSettings) -> int:
    """Measure, print, write the JSON file, and compare ratios with the kept ones.

    Returns:
        0, or 1 when a ratio has worsened.

    Raises:
        UserError: A stage or network is unknown, or there is no GPU.
    """
    work = _workloads(settings)
    on_gpu = settings.device == "cuda"
    offered = _gpu_stages() if on_gpu else _cpu_stages()
    wanted = settings.stages or list(GPU_STAGES if on_gpu else CPU_STAGES)
    for stage in wanted:
        if stage not in offered:
            raise ConfigError("stages", stage, "there is no such stage", f"choose from {', '.join(offered)}")
    began = time.monotonic()
    if on_gpu:
        torch.cuda.init()
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(1)
        keep_freed_memory()  # as a run does
    results = Results(facts())
    # Of some stages alone, the rest of what the file holds is kept.
    earlier = read_results(settings.output) if settings.stages and settings.output.exists() else None
    for stage in wanted:
        if on_gpu and time.monotonic() - began > settings.seconds:
            print(f"no time left for {stage}")
            continue
        start = time.monotonic()
        with _one_core(stage):
            offered[stage](work, settings, results)
        results.facts[f"seconds of {stage}"] = round(time.monotonic() - start, 1)
        _write(settings, results, earlier)
    results.facts["seconds"] = round(time.monotonic() - began)
    results.facts["load after"] = os.getloadavg()[0]
    _write(settings, results, earlier)
    return _guard(settings, results)


def _write(settings: BenchmarkSettings, results: Results, earlier: Results | None) -> None:
    if earlier is not None:
        results = results.on_top_of(earlier, settings.stages)
    results.write(settings.output)


def _guard(settings: BenchmarkSettings, results: Results) -> int:
    for name, spread in results.ratios.items():
        bar, median = spread["bar"], spread["median"]
        if bar is not None and median is not None:
            verdict = "meets" if median <= bar else "misses"
            print(f"{name}: {median:.3f} {verdict} {bar:.3f}")
    if settings.keep_ratios:
        keep_ratios(settings.ratios, results.ratios)
        return 0
    lines = worsened(results.ratios, read_ratios(settings.ratios))
    for line in lines:
        print(f"worse: {line}")
    return 1 if lines else 0


@contextmanager
def _one_core(stage: str) -> Iterator[None]:
    """Pin this process to one core, so that a stage has the same caches and clock throughout."""
    if torch.cuda.is_initialized() or stage in ("scaling", "startup") or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


Stage = Callable[[dict[str, Workload], BenchmarkSettings, Results], None]


def _cpu_stages() -> dict[str, Stage]:
    from benchmarks.startup import measure_startup
    from benchmarks.workers import measure_scaling

    measured, compiled = switches.CPU_SWITCHES, switches.COMPILE_SWITCHES
    return {
        "steps": partial(stages.measure_steps, base={}),
        "attacks": stages.measure_attacks,
        "switches": partial(switches.measure_switches, switches=measured, base={}),
        "parts": partial(parts.measure_parts, base={}),
        "mining": lambda _work, settings, results: stages.measure_mining(settings, results),
        "scaling": measure_scaling,
        "startup": lambda _work, _settings, results: measure_startup(results),
        "compile": partial(switches.measure_switches, switches=compiled, base={}, title="Compiled"),
    }


def _gpu_stages() -> dict[str, Stage]:
    from benchmarks import gpu

    return {
        "numerics": gpu.check_numerics,
        "steps": partial(stages.measure_steps, base=GPU_BASE),
        "switches": partial(switches.measure_switches, switches=gpu.SWITCHES, base=GPU_BASE),
        "parts": partial(parts.measure_parts, base=GPU_BASE),
        "epochs": partial(gpu.measure_epochs, base=GPU_BASE),
        "accuracy": partial(gpu.measure_accuracy_of_precisions, base=GPU_BASE),
    }


def _workloads(settings: BenchmarkSettings) -> dict[str, Workload]:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device", "cuda", "torch sees no GPU", "run on a GPU machine, or give --device cpu")
    work = GPU_WORKLOADS if settings.device == "cuda" else CPU_WORKLOADS
    for name in settings.workloads:
        if name not in work:
            raise ConfigError("workloads", name, "there is no such workload", f"choose from {', '.join(work)}")
    return {name: work[name] for name in settings.workloads or work}
