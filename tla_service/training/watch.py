"""Hung ranks: ranks publish their progress in the process group's store, and all end when one holds up the others."""

import contextlib
import datetime
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from tla_service.errors import UnavailableError
from tla_service.runtime import WorkerContext, gather_objects

START_SECONDS = 1500.0
"""Limit before the first step: one node may decode the data set while another has it in its cache."""
_POLLS = 20  # within the limit
_numbers = itertools.count()


@contextlib.contextmanager
def watched(context: WorkerContext, seconds: float, tell: Callable[[str], object]) -> Iterator[None]:
    """End all processes if one rank holds up the others for so many seconds; every rank enters and leaves the block.

    A rank is hung if others have started a collective and it does not follow, or if its process shows no sign of life.
    One of the others calls `tell` with a message that names rank, node and process; then all exit with code 1. Threads
    do this: the main thread waits inside a collective, where neither gloo nor NCCL can be interrupted.
    """
    if context.world_size == 1:
        yield
        return
    watch = _Watch(context, seconds, tell)
    try:
        yield
    except Exception:
        if watch.is_overdue():  # the error only says that another rank has ended
            os._exit(1)
        raise
    else:
        watch.leave()
    finally:
        watch.stopped.set()


class _Record(NamedTuple):
    beat: str  # differs each time; empty once the rank has left
    started: int  # collectives
    line: str  # where the watched thread is


class _Watch:
    def __init__(self, context: WorkerContext, seconds: float, tell: Callable[[str], object]) -> None:
        self._rank, self._seconds, self._tell, self._period = context.rank, seconds, tell, seconds / _POLLS
        self._watched, self._beats, number = threading.get_ident(), itertools.count(1), next(_numbers)
        self._keys = [f"watch-{number}/{rank}" for rank in range(context.world_size)]
        self._group = dist.distributed_c10d._get_default_group()
        self._store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own
        self._store.set_timeout(datetime.timedelta(seconds=2 * seconds))
        self._publishing, self._has_left, self.stopped = threading.Lock(), False, threading.Event()
        self._publish()
        self._places = gather_objects(f"{socket.gethostname()} (process {os.getpid()})", context)
        self._records: list[_Record] = []
        # Seconds for which a rank has shown no sign of life, and for which others have waited for it.
        self._silent, self._behind = [0.0] * context.world_size, [0.0] * context.world_size
        for work in (self._poll, self._judge):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def leave(self) -> None:
        """Tell the others not to wait for this rank."""
        self._has_left = True
        with contextlib.suppress(RuntimeError):  # the store ends with rank 0
            self._publish()

    def is_overdue(self) -> bool:
        """Whether a rank was about to be found hung."""
        return max(*self._silent, *self._behind) > self._seconds - 4 * self._period

    def _publish(self) -> None:
        code = (frame := sys._current_frames()[self._watched]).f_code
        line = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
        started = self._group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        with self._publishing:
            beat = "" if self._has_left else next(self._beats)
            self._store.set(self._keys[self._rank], f"{beat}|{started}|{line}")

    def _poll(self) -> None:
        """Exchange records; this blocks while the store, which is on rank 0, does not answer."""
        with contextlib.suppress(RuntimeError):
            while not self.stopped.wait(self._period):
                self._publish()
                fields = [value.decode().split("|", 2) for value in self._store.multi_get(self._keys)]
                self._records = [_Record(beat, int(started), line) for beat, started, line in fields]

    def _judge(self) -> None:
        now, new = time.monotonic(), self._records
        while not self.stopped.wait(self._period):
            # Time for which this process was itself stopped does not count.
            before, now = now, time.monotonic()
            passed = min(now - before, 3 * self._period)
            old, new = new, self._records
            if new is old:
                self._silent[0] += passed
            elif old:
                furthest = max(record.started for record in new)
                for rank, (was, record) in enumerate(zip(old, new, strict=True)):
                    is_silent, is_behind = record.beat == was.beat, record.started == was.started < furthest
                    waits = passed if record.beat else 0.0
                    self._silent[rank] = is_silent * (self._silent[rank] + waits)
                    self._behind[rank] = is_behind * (self._behind[rank] + waits)
            silent = [rank for rank, seconds in enumerate(self._silent) if seconds >= self._seconds]
            behind = [rank for rank, seconds in enumerate(self._behind) if seconds >= self._seconds]
            # Others that are behind may be waiting for the last one, too.
            last = [rank for rank in behind if new[rank].started == min(new[each].started for each in behind)]
            if (silent or last) and not self.stopped.is_set():
                place = {rank: f"rank {rank} on {self._places[rank]}" for rank in silent or last}
                what = "shows no sign of life" if silent else "is awaited by the others"
                lines = {rank: "" if silent else f" and is in {new[rank].line}" for rank in place}
                self._end(place, "; ".join(f"{place[rank]} {what}{lines[rank]}" for rank in place))

    def _end(self, hung: Collection[int], reason: str) -> None:
        if self._rank != min(set(range(len(self._keys))) - set(hung), default=0):
            time.sleep(3 * self._period)  # until another rank has told
            os._exit(1)
        try:
            remedy = "look at that process and its node, or raise the limit if it is only slow"
            self._tell(str(UnavailableError("scaling.hang_seconds", self._seconds, reason, remedy)))
        finally:
            os._exit(1)
