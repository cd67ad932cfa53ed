"""Timing on noisy machines: candidates alternate, and ratios are computed within a round."""

import ctypes
import gc
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil
import torch


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Median and quartiles; of fewer than four values, their extremes."""
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass
class Times:
    """Seconds of each candidate's turns, in order, by the wall clock and in CPU time."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def seconds(self, name: str) -> Spread:
        """Wall-clock seconds a turn."""
        return Spread.of(self.wall[name])

    def ratio(self, above: str, below: str, clock: str = "wall") -> Spread:
        """Time of one candidate over another's, turn by turn."""
        turns = self.cpu if clock == "cpu" else self.wall
        return Spread.of([first / second for first, second in zip(turns[above], turns[below], strict=True)])


def synchronize() -> None:
    """Wait for the device, if there is one to wait for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    least_seconds: float = 0.0,
    burn_in: int = 1,
    repeats: int = 1,
) -> Times:
    """Time candidates in rounds, each once per round, between synchronizations.

    Args:
        candidates: What to run, by name. CPU time is this process's, and that in a candidate's own attribute
            `cpu_seconds`, if it has one because it runs elsewhere.
        rounds: Timed rounds, at least; every second one goes the other way round.
        least_seconds: More rounds follow until this long has passed: short runs need many for a firm median.
        burn_in: Runs of each candidate before.
        repeats: Runs in a row that make one turn.
    """
    for run in candidates.values():
        for _ in range(burn_in):
            run()
    times = Times({name: [] for name in candidates}, {name: [] for name in candidates})
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        for turn in itertools.count():
            if turn >= rounds and time.perf_counter() - began >= least_seconds:
                break
            for name in list(candidates)[:: -1 if turn % 2 else 1]:
                run = candidates[name]
                synchronize()
                wall, cpu = time.perf_counter(), _cpu_seconds(run)
                for _ in range(repeats):
                    run()
                synchronize()
                times.wall[name].append((time.perf_counter() - wall) / repeats)
                times.cpu[name].append((_cpu_seconds(run) - cpu) / repeats)
    finally:
        gc.enable()
    return times


def _cpu_seconds(run: Callable[[], object]) -> float:
    elsewhere: float = getattr(run, "cpu_seconds", 0.0)
    return time.process_time() + elsewhere


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Peak bytes used inside the block beyond those used before it, as the list's only entry.

    On a GPU memory that torch has reserved, which includes the pools of CUDA graphs; on a CPU the process's resident
    memory, sampled every 2 ms.
    """
    result: list[int] = [0]
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        yield result
        torch.cuda.synchronize()
        result[0] = torch.cuda.max_memory_reserved() - before
        return
    process, ended = psutil.Process(), threading.Event()
    _give_back()
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.002):
            result[0] = max(result[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield result
    finally:
        ended.set()
        watcher.join()


def _give_back() -> None:
    """Return freed memory to the system, since its reuse would not be visible."""
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc has it, other C libraries do not
        ctypes.CDLL(None).malloc_trim(0)
