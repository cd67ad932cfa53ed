"""Hung ranks: ranks publish their progress in the process group's store, and all end when one holds up the others."""

import contextlib
import datetime
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from tla_service.runtime import WorkerContext, gather_objects

START_SECONDS = 1500.0  # limit before the first step: one node may decode the data while another has them in its cache
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
        watch.publish(has_left=True)
    except Exception:
        watch.end_if_overdue()
        raise
    finally:
        watch.stopped.set()


class _Watch:
    def __init__(self, context: WorkerContext, seconds: float, tell: Callable[[str], object]) -> None:
        self._rank, self._seconds, self._tell, self._period = context.rank, seconds, tell, seconds / _POLLS
        self._watched, number = threading.get_ident(), next(_numbers)
        self._keys = [f"watch-{number}/{rank}" for rank in range(context.world_size)]
        self._group = dist.distributed_c10d._get_default_group()
        self._store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own
        self._store.set_timeout(datetime.timedelta(seconds=2 * seconds))
        self._lock, self._beats, self.stopped = threading.Lock(), itertools.count(1), threading.Event()
        self.publish()
        self._places = gather_objects(f"{socket.gethostname()} (process {os.getpid()})", context)
        # By rank: sign of life, number of collectives started, line of code; and seconds for which it holds up others.
        self._records, self._idle = [("0", 0, "")] * context.world_size, [0.0] * context.world_size
        for work in (self._poll, self._judge):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def publish(self, *, has_left: bool = False) -> None:
        """Write this rank's record; its sign of life is empty once it has left."""
        code = (frame := sys._current_frames()[self._watched]).f_code
        line = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
        started = self._group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        with self._lock, contextlib.suppress(*[RuntimeError] * has_left):  # rank 0 may be gone with the store
            if not self.stopped.is_set():
                self._store.set(self._keys[self._rank], f"{'' if has_left else next(self._beats)}|{started}|{line}")
            if has_left:
                self.stopped.set()

    def end_if_overdue(self) -> None:
        """Exit after an error if it only says that other ranks have ended, since one was about to be found hung."""
        if max(self._idle) > self._seconds - 4 * self._period:
            os._exit(1)

    def _poll(self) -> None:
        """Exchange records; this blocks while the store, which is on rank 0, does not answer."""
        try:
            while not self.stopped.wait(self._period):
                self.publish()
                fields = [value.decode().split("|", 2) for value in self._store.multi_get(self._keys)]
                self._records = [(beat, int(started), line) for beat, started, line in fields]
        except (RuntimeError, KeyError):  # KeyError: the watched thread has ended
            self.end_if_overdue()

    def _judge(self) -> None:
        now, new, silent = time.monotonic(), self._records, [0.0] * len(self._keys)
        while not self.stopped.wait(self._period):
            # Time for which this process was itself stopped does not count.
            before, now = now, time.monotonic()
            passed = min(now - before, 3 * self._period)
            old, new = new, self._records
            furthest = max(started for _, started, _ in new)
            for rank, ((last, reached, _), (beat, started, _)) in enumerate(zip(old, new, strict=True)):
                if new is not old or rank == 0:
                    is_silent = new is old or beat == last != ""
                    is_behind = beat != "" and reached == started < furthest
                    silent[rank] = silent[rank] + passed if is_silent else 0.0
                    self._idle[rank] = self._idle[rank] + passed if is_silent or is_behind else 0.0
            hung = [rank for rank, seconds in enumerate(self._idle) if seconds >= self._seconds]
            if hung and not self.stopped.is_set():
                named = {rank: "has shown no sign of life" for rank in hung if silent[rank] > self._seconds / 2}
                lowest = min(new[rank][1] for rank in hung)  # others that are behind may be waiting for it, too
                behind = [rank for rank in hung if new[rank][1] == lowest]
                self._end(named or {rank: f"is at {new[rank][2]} and has held up the others" for rank in behind})

    def _end(self, hung: dict[int, str]) -> None:
        if self._rank != min(set(range(len(self._keys))) - set(hung), default=0):
            time.sleep(3 * self._period)  # until another rank has told
            os._exit(1)
        try:
            told = "; ".join(f"rank {rank} on {self._places[rank]} {what}" for rank, what in hung.items())
            remedy = "look at that process and its node, or raise scaling.hang_seconds if it is only slow"
            self._tell(f"{told} for {self._seconds:g} s; {remedy}")
        finally:
            os._exit(1)
