"""The effect of each speed setting."""

from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.elsewhere import Candidates, elsewhere
from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.stages import BURN_IN, LEAST_SECONDS, context_of
from benchmarks.timing import take_turns
from benchmarks.workloads import Changes, FullStep, Workload, merged
from tla_service.runtime import WorkerContext, keep_freed_memory

# (name, configuration with it, configuration without it).
Switch = tuple[str, Changes, Changes]
CPU_SWITCHES: list[Switch] = [
    ("speed.keep_freed_memory: true", {"speed": {"keep_freed_memory": True}}, {"speed": {"keep_freed_memory": False}}),
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
COMPILE_SWITCHES: list[Switch] = [("speed.compile: attack", {"speed": {"compile": "attack"}}, {})]


def measure_switches(
    work: dict[str, Workload],
    settings: BenchmarkSettings,
    results: Results,
    switches: list[Switch],
    title: str = "Switches",
) -> None:
    """Time of a TLA step without a setting over the time with it."""
    context, rows, burn_in = context_of(settings), [], BURN_IN[settings.device]
    for workload in work.values():
        if not workload.has_all_stages:
            continue
        with ExitStack() as kept:
            plain = _step(kept, workload, context, {})
            # Pair by pair: each compiled variant keeps graphs of gigabytes as long as it lives.
            for name, *sides in switches:
                with ExitStack() as stack:
                    pair = {
                        side: _step(stack, workload, context, changes) if changes else plain
                        for side, changes in zip(("with", "without"), sides, strict=True)
                    }
                    least = LEAST_SECONDS[settings.device] / len(switches)
                    times = take_turns(pair, rounds=settings.rounds, least_seconds=least, burn_in=burn_in)
                rows.append([workload.name, f"`{name}`", str(times.ratio("without", "with", settings.clock))])
    results.table(title, ["network", "switch", "time without over time with it (quartiles)"], rows)


def _step(stack: ExitStack, workload: Workload, context: WorkerContext, changes: Changes) -> Callable[[], object]:
    """A step under these changes, with a separate pool as large as the batch, until the stack is left."""
    if changes.get("mining", {}).get("pool") == "separate":
        changes = merged(changes, {"mining": {"pool_size": workload.batch_size}})
    if "keep_freed_memory" in changes.get("speed", {}):
        # No process can go back, so each side has one; nor would a step in this one, among so many, be comparable.
        return stack.enter_context(elsewhere(_alone, workload, context, changes))["step"]
    step = FullStep(workload, context, **changes)
    stack.callback(step.batches.close)
    return step


def _alone(workload: Workload, context: WorkerContext, changes: Changes) -> Candidates:
    if changes["speed"]["keep_freed_memory"]:
        keep_freed_memory()
    yield "step", FullStep(workload, context, **changes)
