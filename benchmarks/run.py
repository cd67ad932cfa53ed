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

from benchmarks import parts, stages, switches
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
        UserError: A stage or network is unknown, or there is no GPU.
    """
    work, offered = _workloads(settings), _stages(settings)
    wanted = settings.stages or list(GPU_STAGES if settings.device == "cuda" else CPU_STAGES)
    for stage in wanted:
        if stage not in offered:
            raise ConfigError("stages", stage, "there is no such stage", f"choose from {', '.join(offered)}")
    if settings.device == "cpu":
        return _guard(settings, measure(settings, wanted, again=bool(settings.stages or settings.workloads)))
    deadline = time.monotonic() + settings.seconds
    for index, (key, stage) in enumerate(itertools.product(work, wanted)):
        again = index > 0 or bool(settings.stages or settings.workloads)
        left = deadline - time.monotonic()
        if left <= 0 or not _measure_elsewhere(
            settings.model_copy(update={"workloads": [key]}), stage, left, again=again
        ):
            print(f"no time left for {stage} of {key}", flush=True)
    return _guard(settings, read_results(settings.output))


def measure(settings: BenchmarkSettings, wanted: list[str], *, again: bool) -> Results:
    """Run stages in this process, and write the file after each.

    Args:
        settings: What to measure.
        wanted: The stages.
        again: Keep what the file holds of other stages and networks.
    """
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
    earlier = read_results(settings.output) if again and settings.output.exists() else None
    measured = [f"{stage} of {', '.join(settings.workloads)}" if settings.workloads else stage for stage in wanted]
    for stage in wanted:
        start = time.monotonic()
        with _one_core(stage):
            offered[stage](work, settings, results)
        results.facts[f"seconds of {stage}"] = round(time.monotonic() - start, 1)
        results.facts["seconds"] = round(time.monotonic() - began)
        results.facts["load after"] = os.getloadavg()[0]
        (results if earlier is None else results.on_top_of(earlier, measured)).write(settings.output)
    return results


def _measure_elsewhere(settings: BenchmarkSettings, stage: str, seconds: float, *, again: bool) -> bool:
    """Run a stage in a new process, without what earlier ones compiled or hold in memory.

    Returns:
        Whether it ended in time; if not, it was killed, and the file is as it was.

    Raises:
        RuntimeError: It failed.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=measure, args=(settings, [stage]), kwargs={"again": again}
    )
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return False
    if process.exitcode:
        raise RuntimeError(f"stage {stage} failed on {', '.join(settings.workloads)}")
    return True


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


def _stages(settings: BenchmarkSettings) -> dict[str, Stage]:
    if settings.device == "cuda":
        from benchmarks import gpu

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
