"""Stages of the benchmark that run in one process: whole steps, attacks, switches, parts, mining."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tla_service.benchmark.floor import Floor, matrix_rate
from tla_service.benchmark.peers import PeerWork
from tla_service.benchmark.results import Results
from tla_service.benchmark.settings import BenchmarkSettings
from tla_service.benchmark.timing import Spread, peak_memory, take_turns
from tla_service.benchmark.workloads import FullStep, Workload
from tla_service.runtime import WorkerContext, generator
from tla_service.triplets import mine_hardest

# On a CPU runs of a quarter of a second vary by a tenth and more; this many seconds of them give a firm median.
LEAST_SECONDS = {"cpu": 30.0, "cuda": 0.0}
LITERAL: dict[str, Any] = {
    "mining": {"pool": "separate", "positives": "both"},
    "training": {"batchnorm_roles": "apart"},
}
# What each switch is worth: (name, configuration with it, configuration without it).
Changes = dict[str, Any]
COMMON_SWITCHES: list[tuple[str, Changes, Changes]] = [
    ("speed.fold_batchnorm: true", {}, {"speed": {"fold_batchnorm": False}}),
    ("speed.fused_optimizer: true", {}, {"speed": {"fused_optimizer": False}}),
    ("mining.pool: batch", {}, {"mining": {"pool": "separate"}}),
    ("training.batchnorm_roles: together", {}, {"training": {"batchnorm_roles": "apart"}}),
    (
        "mining.queries: last_step",
        {"mining": {"pool": "separate", "queries": "last_step"}},
        {"mining": {"pool": "separate"}},
    ),
    ("training.channels_last: true", {"training": {"channels_last": True}}, {}),
    ("training.precision: bfloat16", {"training": {"precision": "bfloat16"}}, {}),
    ("data.residency: device", {}, {"data": {"residency": "stream", "loader_workers": 1}}),
]
COMPILE_SWITCHES: list[tuple[str, Changes, Changes]] = [
    ("speed.compile: attack", {"speed": {"compile": "attack"}}, {}),
]


def pool_of(workload: Workload) -> Changes:
    """The literal mode with the pool as large as the batch, as in the authors' code for MNIST and Tiny ImageNet."""
    return {**LITERAL, "mining": {**LITERAL["mining"], "pool_size": workload.batch_size}}


def measure_steps(work: dict[str, Workload], settings: BenchmarkSettings, results: Results, base: Changes) -> None:
    """Whole training steps: the floor, plain AT, TLA cheap and literal, and other libraries' AT."""
    context, rows = context_of(settings), []
    training = base.get("training", {})
    precision, layout = training.get("precision", "float32"), training.get("channels_last", False)
    rate = matrix_rate(context.device, getattr(torch, precision))
    for key, workload in work.items():
        floors = [
            Floor(workload, context, precision=precision, channels_last=layout, with_clean=clean)
            for clean in (False, True)
        ]
        at = FullStep(workload, context, **merged(base, {"method": "at"}))
        tla = FullStep(workload, context, **base)
        literal = FullStep(workload, context, **merged(base, pool_of(workload)))
        ours: dict[str, Callable[[], object]] = {
            "floor of AT": floors[0],
            "AT": at,
            "floor of TLA": floors[1],
            "TLA, pool: batch": tla,
            "TLA, literal": literal,
        }
        theirs = dict(PeerWork(workload, context).steps()) if workload.num_steps <= 10 else {}
        times = take_turns(ours | theirs, rounds=settings.rounds, least_seconds=LEAST_SECONDS[settings.device])
        with peak_memory() as memory:
            tla()
        flops = floors[1].flops()
        for name in (*ours, *theirs):
            spread = times.seconds(name)
            ratio = times.ratio(name, "AT", settings.clock)
            rows.append([workload.name, name, f"{workload.batch_size / spread.median:.1f}", str(ratio)])
        tla_seconds = times.seconds("TLA, pool: batch").median
        share = flops / tla_seconds / rate.median
        rows.append(
            [workload.name, "TLA: FLOP/s, share of the matrix rate", f"{flops / tla_seconds:.3g}", f"{share:.2f}"]
        )
        rows.append([workload.name, "TLA: peak memory of a step, MiB", f"{memory[0] / 2**20:.0f}", ""])
        keep_step_ratios(key, workload, times, theirs, settings, results)
        results.raw[f"step seconds {key}"] = {name: times.seconds(name).median for name in times.wall}
        results.raw[f"parameters {key}"] = sum(parameter.numel() for parameter in tla.network.parameters())
        results.raw[f"flops {key}"] = flops
    results.raw["matrix FLOP/s"] = rate.median
    results.table("Steps", ["network", "step", "images/s", "time over AT (quartiles)"], rows)


def keep_step_ratios(
    key: str, workload: Workload, times: Any, theirs: Any, settings: BenchmarkSettings, results: Results
) -> None:
    """Ratios of whole steps that have a bar."""
    long, on_gpu = workload.num_steps >= 40, settings.device == "cuda"
    bars = {
        "AT over its floor": ("AT", "floor of AT", 1.15 if on_gpu else 1.10),
        "TLA over its floor": ("TLA, pool: batch", "floor of TLA", 1.15 if on_gpu else 1.10),
        "TLA over AT": ("TLA, pool: batch", "AT", 1.05 if long else 1.20),
        "literal TLA over AT": ("TLA, literal", "AT", 1.12 if long else 1.50),
    }
    bars |= {f"AT over {name}": ("AT", name, 1 / 2.5 if on_gpu else 1.0) for name in theirs}
    for name, (above, below, bar) in bars.items():
        results.ratio(f"{settings.device} {key}: {name}", times.ratio(above, below, settings.clock), bar)


def measure_attacks(work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """Images attacked a second: ours and other libraries'."""
    context, rows = context_of(settings), []
    for key, workload in work.items():
        if workload.num_steps > 10:
            continue
        ours = FullStep(workload, context)
        batch = ours.next_batch().anchors
        peers = dict(PeerWork(workload, context).attacks())
        craft = partial(ours.adversary.craft, batch, generator(context.device, 0))
        candidates: dict[str, Callable[[], object]] = {"ours": craft, **peers}
        times = take_turns(candidates, rounds=settings.rounds, least_seconds=LEAST_SECONDS[settings.device])
        for name in candidates:
            rate = workload.batch_size / times.seconds(name).median
            rows.append([workload.name, name, f"{rate:.1f}", str(times.ratio(name, "ours", settings.clock))])
        for name in peers:
            spread = times.ratio("ours", name, settings.clock)
            results.ratio(f"{settings.device} {key}: attack over {name}", spread, 1.0)
    results.table("Attacks", ["network", "attack", "images attacked/s", "time over ours (quartiles)"], rows)


def measure_switches(
    work: dict[str, Workload],
    settings: BenchmarkSettings,
    results: Results,
    switches: list[tuple[str, Changes, Changes]],
    base: Changes,
    title: str = "Switches",
) -> None:
    """Time of a TLA step without a switch over the time with it."""
    context, rows = context_of(settings), []
    for workload in work.values():
        if workload.num_steps > 10:
            continue
        # One step for each configuration, all in the same turns; most pairs share the base.
        built: dict[str, FullStep] = {}
        for changes in (side for _, *sides in switches for side in sides):
            if str(changes) not in built:
                built[str(changes)] = FullStep(workload, context, **merged(base, sized(changes, workload)))
        times = take_turns(
            built,
            rounds=settings.rounds,
            least_seconds=LEAST_SECONDS[settings.device],
            burn_in=3 if settings.device == "cuda" else 1,
        )
        for name, with_it, without in switches:
            ratio = times.ratio(str(without), str(with_it), settings.clock)
            rows.append([workload.name, f"`{name}`", str(ratio)])
        for step in built.values():
            step.batches.close()
    results.table(title, ["network", "switch", "time without over time with it (quartiles)"], rows)


def sized(changes: Changes, workload: Workload) -> Changes:
    """Changes with a separate pool as large as the batch."""
    if changes.get("mining", {}).get("pool") != "separate":
        return changes
    return {**changes, "mining": {**changes["mining"], "pool_size": workload.batch_size}}


def measure_parts(work: dict[str, Workload], settings: BenchmarkSettings, results: Results, base: Changes) -> None:
    """Where a TLA step's time goes: every part between two synchronisations."""
    rows = []
    for key, workload in work.items():
        parts = Parts(FullStep(workload, context_of(settings), **base))
        turns: dict[str, list[float]] = {}
        for turn in range(settings.rounds + 1):
            for name, run in parts.in_order().items():
                seconds = take_turns({name: run}, rounds=1, burn_in=0).wall[name][0]
                if turn:
                    turns.setdefault(name, []).append(seconds)
        medians = {name: Spread.of(values) for name, values in turns.items()}
        whole = sum(spread.median for name, spread in medians.items() if name != Parts.MINING)
        for name, spread in medians.items():
            rows.append([workload.name, name, f"{1000 * spread.median:.1f}", f"{100 * spread.median / whole:.1f} %"])
        results.raw[f"parts {key}"] = {name: spread.median for name, spread in medians.items()}
    results.table("Parts", ["network", "part", "ms a step", "share"], rows)


class Parts:
    """A step, part by part.

    Args:
        step: The step.
    """

    MINING = "mining alone (within the forward part)"

    def __init__(self, step: FullStep) -> None:
        self.step, self.random = step, generator(step.context.device, 0)
        self.batch = step.next_batch()
        self.images = self.batch.anchors.images

    def in_order(self) -> dict[str, Callable[[], object]]:
        """The parts, to be run in this order, each once a step."""
        return {
            "data and augmentation": self.read,
            "attack": self.attack,
            "forward, mining, loss": self.forward,
            "backward": self.backward,
            "optimiser": self.step.optimizer.step,
            "meter": lambda: self.step.meter.add(self.totals),
            self.MINING: self.mine,
        }

    def read(self) -> None:
        """Wait for a batch; gather and augment it."""
        self.batch = self.step.next_batch()

    def attack(self) -> None:
        """Craft the adversarial images."""
        self.images = self.step.adversary.craft(self.batch.anchors, self.random)

    def forward(self) -> None:
        """All roles through the network, negatives, and the loss."""
        self.step.optimizer.zero_grad(set_to_none=True)
        self.terms, self.totals = self.step.step.objective(self.batch, self.images, self.random)
        size = getattr(self.step.network, "embedding_size", 512)
        self.embeddings = torch.rand(len(self.images), size, device=self.images.device)

    def backward(self) -> None:
        """Gradients of all weights, and their reduction."""
        self.terms.total.backward()

    def mine(self) -> None:
        """The search for negatives, once more, on embeddings of the same size."""
        labels = self.batch.anchors.labels
        mine_hardest(self.embeddings, labels, self.embeddings, labels)


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


def merged(base: Changes, changes: Changes) -> Changes:
    """Configuration changes, section by section."""
    both = dict(base)
    for key, value in changes.items():
        both[key] = {**both.get(key, {}), **value} if isinstance(value, dict) else value
    return both


def context_of(settings: BenchmarkSettings) -> WorkerContext:
    """The lone worker on the device."""
    return WorkerContext(device=torch.device(settings.device))
