"""Stages of the benchmark: whole training steps, attacks, mining."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch

from benchmarks.floor import Floor, matrix_rate
from benchmarks.peers import peers
from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.timing import Times, peak_memory, take_turns
from benchmarks.workloads import Changes, FullStep, Workload, merged
from tla_service.runtime import WorkerContext, generator
from tla_service.triplets import mine_hardest

# On a CPU runs of a quarter of a second vary by a tenth and more; this many seconds of them give a firm median.
LEAST_SECONDS = {"cpu": 30.0, "cuda": 0.0}
BURN_IN = {"cpu": 1, "cuda": 3}
METHODS: dict[str, Changes] = {
    "ALP": {"method": "alp"},
    "TRADES": {"method": "trades"},
    "MART": {"method": "mart"},
    "TLA-RN": {"method": "tla_rn"},
    "TLA-SA": {"method": "tla_sa"},
    "TLA-TRADES": {"loss": {"robust_term": "trades"}},
}
# Positives of the literal mode: one, as the bars' arithmetic and the authors' code for MNIST have it, or two.
LITERAL = {"TLA, literal": "same_class", "TLA, literal, two positives": "both"}


def literal(workload: Workload, positives: str) -> Changes:
    """The literal mode with the pool as large as the batch, as in the authors' code for MNIST and Tiny ImageNet."""
    mining = {"pool": "separate", "pool_size": workload.batch_size, "positives": positives}
    return {"mining": mining, "training": {"batchnorm_roles": "apart"}}


def measure_steps(
    work: dict[str, Workload],
    settings: BenchmarkSettings,
    results: Results,
    base: Changes,
    *,
    title: str = "Steps",
    suffix: str = "",
    others: bool = True,
) -> None:
    """Whole training steps: the floor in the same precision and layout, plain AT, TLA.

    Args:
        work: Networks, by name.
        settings: How to measure.
        results: Where to keep it.
        base: Changes to the default settings.
        title: Of the table.
        suffix: Of each network's name among the ratios and raw numbers.
        others: Include the literal mode and other libraries.
    """
    context, rows = context_of(settings), []
    for name, workload in work.items():
        key = name + suffix
        tla = FullStep(workload, context, **base)
        training = tla.config.training
        rate = matrix_rate(context.device, getattr(torch, training.precision))
        floors = [
            Floor(
                workload,
                context,
                precision=training.precision,
                channels_last=bool(training.channels_last),
                with_clean=clean,
            )
            for clean in (False, True)
        ]
        ours: dict[str, Callable[[], object]] = {
            "floor of AT": floors[0],
            "AT": FullStep(workload, context, **merged(base, {"method": "at"})),
            "floor of TLA": floors[1],
            "TLA, pool: batch": tla,
        }
        for label, changes in METHODS.items() if others and workload.num_steps <= 10 else ():
            ours[label] = FullStep(workload, context, **merged(base, changes))
        for mode, positives in LITERAL.items() if others else ():
            ours[mode] = FullStep(workload, context, **merged(base, literal(workload, positives)))
        with ExitStack() as stack:
            beside = others and workload.has_all_stages
            theirs = stack.enter_context(peers("steps", workload, context)) if beside else {}
            least, burn_in = LEAST_SECONDS[settings.device], BURN_IN[settings.device]
            times = take_turns({**ours, **theirs}, rounds=settings.rounds, least_seconds=least, burn_in=burn_in)
        with peak_memory() as memory:  # of a new one: the graphs of the one above have their memory already
            FullStep(workload, context, **base)()
        for step in times.wall:
            rate_of_images = f"{workload.batch_size / times.seconds(step).median:.1f}"
            rows.append([workload.name, step, rate_of_images, str(times.ratio(step, "AT", settings.clock))])
        flops = floors[1].flops()
        speed = flops / times.seconds("TLA, pool: batch").median
        share = f"{speed / rate.median:.2f}"
        rows.append([workload.name, "TLA: FLOP/s, share of the matrix rate", f"{speed:.3g}", share])
        rows.append([workload.name, "TLA: peak memory, weights included, MiB", f"{memory[0] / 2**20:.0f}", ""])
        keep_step_ratios(key, workload, times, list(theirs), settings, results)
        results.raw[f"step seconds {key}"] = {step: times.seconds(step).median for step in times.wall}
        results.raw[f"parameters {key}"] = sum(parameter.numel() for parameter in tla.network.parameters())
        results.raw[f"flops {key}"] = flops
        results.raw[f"matrix FLOP/s {key}"] = rate.median
    results.table(title, ["network", "step", "images/s", "time over AT (quartiles)"], rows)


def keep_step_ratios(
    key: str, workload: Workload, times: Times, theirs: list[str], settings: BenchmarkSettings, results: Results
) -> None:
    """Ratios of whole steps, with their thresholds."""
    long, on_gpu = workload.num_steps >= 40, settings.device == "cuda"
    bars: dict[str, tuple[str, str, float | None]] = {
        "AT over its floor": ("AT", "floor of AT", 1.15 if on_gpu else 1.10),
        "TLA over its floor": ("TLA, pool: batch", "floor of TLA", 1.15 if on_gpu else 1.10),
        "TLA over AT": ("TLA, pool: batch", "AT", 1.05 if long else 1.20),
        "literal TLA over AT": ("TLA, literal", "AT", 1.12 if long else 1.50),
        "literal TLA with two positives over AT": ("TLA, literal, two positives", "AT", None),
    }
    bars |= {f"AT over {name}": ("AT", name, 1 / 2.5 if on_gpu else 1.0) for name in theirs}
    for name, (above, below, bar) in bars.items():
        if above not in times.wall:
            continue
        ratio = times.ratio(above, below, settings.clock)
        results.ratio(f"{settings.device} {key}: {name}", ratio, bar if workload.num_steps >= 7 else None)


def measure_attacks(work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """Images attacked per second, by us and other libraries."""
    context, rows = context_of(settings), []
    for key, workload in work.items():
        if not workload.has_all_stages:
            continue
        ours = FullStep(workload, context)
        batch = ours.next_batch().anchors
        craft = partial(ours.adversary.craft, batch, generator(context.device, 0))
        with peers("attacks", workload, context) as theirs:
            least = LEAST_SECONDS[settings.device]
            times = take_turns({"ours": craft, **theirs}, rounds=settings.rounds, least_seconds=least)
        for name in times.wall:
            rate = workload.batch_size / times.seconds(name).median
            rows.append([workload.name, name, f"{rate:.1f}", str(times.ratio(name, "ours", settings.clock))])
        for name in theirs:
            spread = times.ratio("ours", name, settings.clock)
            results.ratio(f"{settings.device} {key}: attack over {name}", spread, 1.0)
    results.table("Attacks", ["network", "attack", "images attacked/s", "time over ours (quartiles)"], rows)


def measure_mining(settings: BenchmarkSettings, results: Results) -> None:
    """The hardest negatives of 1,024 anchors in a pool of 10,000, 640 dimensions."""
    device = context_of(settings).device
    draws = generator(device, 0)
    anchors, pool = (torch.randn(count, 640, generator=draws, device=device) for count in (1024, 10_000))
    labels, pool_labels = (torch.arange(count, device=device) % 10 for count in (1024, 10_000))
    with peak_memory() as memory:
        mine_hardest(anchors, labels, pool, pool_labels)
    times = take_turns({"mining": lambda: mine_hardest(anchors, labels, pool, pool_labels)}, rounds=settings.rounds)
    seconds = times.seconds("mining")
    results.raw["mining"] = {"seconds": seconds.median, "bytes": memory[0]}
    row = ["10,000", "1,024", "640", f"{1000 * seconds.median:.0f}", f"{memory[0] / 2**20:.0f}"]
    results.table("Mining", ["pool", "batch", "dimensions", "ms", "peak MiB beyond the embeddings"], [row])


def context_of(settings: BenchmarkSettings) -> WorkerContext:
    """The single worker on the device."""
    return WorkerContext(device=torch.device(settings.device))
