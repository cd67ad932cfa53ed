"""Runs the stages of the benchmark, writes their results, and compares ratios with the kept ones."""

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch._dynamo

from benchmarks import gpu, parts, stages, switches
from benchmarks.results import Results, facts, keep_ratios, read_ratios, read_results, worsened
from benchmarks.settings import CPU_STAGES, GPU_STAGES, BenchmarkSettings
from benchmarks.workloads import CPU_WORKLOADS, GPU_WORKLOADS, Workload
from tla_service.errors import ConfigError, UnavailableError
from tla_service.runtime import keep_freed_memory


def run_benchmark(settings: BenchmarkSettings) -> int:
    """Measure, print, write the JSON file, and compare ratios with the kept ones.

    Returns:
        0, or 1 when a ratio has worsened.

    Raises:
        UserError: A stage, network or variant is unknown, or there is no GPU.
    """
    work, offered = _workloads(settings), _stages(settings)
    wanted = settings.stages or list(GPU_STAGES if settings.device == "cuda" else CPU_STAGES)
    for name, given, known in (("stages", wanted, offered), ("variants", settings.variants, gpu.VARIANTS)):
        for each in given:
            if each not in known:
                raise ConfigError(name, each, f"there is no such {name[:-1]}", f"choose from {'; '.join(known)}")
    if settings.device == "cpu":
        return _guard(settings, measure(settings, wanted).ratios)
    deadline, before = time.monotonic() + settings.seconds, _kept(settings)
    for key, stage in itertools.product(work, wanted):
        left = deadline - time.monotonic()
        if left <= 0 or not _measure_elsewhere(settings.model_copy(update={"workloads": [key]}), stage, left):
            print(f"no time left for {stage} of {key}", flush=True)
    # Of stages that were killed the file has the ratios of an earlier run, if any.
    found = {name: spread for name, spread in _kept(settings).ratios.items() if spread != before.ratios.get(name)}
    return _guard(settings, found)


def measure(settings: BenchmarkSettings, wanted: list[str]) -> Results:
    """Run stages in this process, and write the file after each; it keeps results of other stages and networks."""
    began = time.monotonic()
    # All candidates of a stage compile the same code object, each with its own guards; past the limit, dynamo would
    # silently run it eagerly.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if settings.device == "cuda":
        torch.cuda.init()
    else:
        torch.set_num_threads(1)
        keep_freed_memory()  # as a run does
    work, offered, results = _workloads(settings), _stages(settings), Results(facts())
    earlier, measured = _kept(settings), list[str]()
    for stage in wanted:
        start = time.monotonic()
        with _one_core(stage):
            offered[stage](work, settings, results)
        results.facts[f"seconds of {stage}"] = round(time.monotonic() - start, 1)
        results.facts["seconds"] = round(time.monotonic() - began)
        results.facts["load after"] = os.getloadavg()[0]
        measured.append(f"{stage} of {', '.join(settings.workloads)}" if settings.workloads else stage)
        is_main = not earlier.facts or measured == list(CPU_STAGES)
        results.on_top_of(earlier, measured, is_main=is_main).write(settings.output)
    return results


def _kept(settings: BenchmarkSettings) -> Results:
    return read_results(settings.output) if settings.output.exists() else Results()


def _measure_elsewhere(settings: BenchmarkSettings, stage: str, seconds: float) -> bool:
    """Run a stage in a new process, without what earlier ones compiled or hold in memory.

    Returns:
        Whether it ended in time; if not, it was killed, and the file is as it was.

    Raises:
        RuntimeError: It failed.
    """
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(settings, [stage]))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return False
    if process.exitcode:
        raise RuntimeError(f"stage {stage} failed on {', '.join(settings.workloads)}")
    return True


def _guard(settings: BenchmarkSettings, found: dict[str, dict[str, float | None]]) -> int:
    for name, spread in found.items():
        bar, median = spread["bar"], spread["median"]
        if bar is not None and median is not None:
            verdict = "meets" if median <= bar else "misses"
            print(f"{name}: {median:.3f} {verdict} {bar:.3f}")
    if settings.keep_ratios:
        keep_ratios(settings.ratios, found)
        return 0
    lines = worsened(found, read_ratios(settings.ratios))
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


def _stages(settings: BenchmarkSettings) -> dict[str, Stage]:
    if settings.device == "cuda":
        return {
            "numerics": gpu.check_numerics,
            "steps": partial(stages.measure_steps, base={}),
            "fast_steps": partial(
                stages.measure_steps, base=gpu.FAST, title="Fast steps", suffix=", bfloat16 compiled", others=False
            ),
            "parts": parts.measure_parts,
            "settings": gpu.measure_settings,
            "accuracy": gpu.measure_accuracy_of_precisions,
        }
    from benchmarks.checkpoints import measure_checkpoints
    from benchmarks.evaluation import measure_evaluation
    from benchmarks.startup import measure_startup
    from benchmarks.workers import measure_scaling

    return {
        "steps": partial(stages.measure_steps, base={}),
        "attacks": stages.measure_attacks,
        "switches": partial(switches.measure_switches, switches=switches.CPU_SWITCHES),
        "parts": parts.measure_parts,
        "mining": lambda _work, settings, results: stages.measure_mining(settings, results),
        "scaling": measure_scaling,
        "checkpoints": lambda _work, settings, results: measure_checkpoints(settings, results),
        "startup": lambda _work, _settings, results: measure_startup(results),
        "evaluation": measure_evaluation,
        "compile": partial(switches.measure_switches, switches=switches.COMPILE_SWITCHES, title="Compiled"),
    }


def _workloads(settings: BenchmarkSettings) -> dict[str, Workload]:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device", "cuda", "torch sees no GPU", "run on a GPU machine, or give --device cpu")
    work = GPU_WORKLOADS if settings.device == "cuda" else CPU_WORKLOADS
    for name in settings.workloads:
        if name not in work:
            raise ConfigError("workloads", name, "there is no such workload", f"choose from {', '.join(work)}")
    return {name: work[name] for name in settings.workloads or work}
