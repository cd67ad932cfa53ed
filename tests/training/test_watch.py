"""Real gloo processes of which one hangs: the others name it and end."""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.conftest import free_port
from tla_service.runtime import all_reduce_sum, process_group
from tla_service.training.watch import watched

pytestmark = pytest.mark.distributed

SECONDS = 3.0  # that a rank may hold up the others
PAUSE = 1.0  # a healthy one


def stop(rank: int) -> None:
    """Freeze a rank's process."""
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGSTOP)


def read_slowly(rank: int) -> None:
    """Block a rank's main thread."""
    if int(os.environ["RANK"]) == rank:
        time.sleep(600)


def fail(rank: int) -> None:
    """End a rank's main thread with an error, its process staying."""
    if int(os.environ["RANK"]) == rank:
        raise ValueError("a fault of its own")


def pause(rank: int) -> None:
    """Hold up the others for less than the limit, and all together for more."""
    time.sleep(SECONDS + PAUSE * (int(os.environ["RANK"]) == rank))


@contextlib.contextmanager
def staying() -> Iterator[None]:
    """As Ray's workers do, stay after an error until somebody ends the process."""
    try:
        yield
    except ValueError:
        time.sleep(600)


def work(rank: int, world_size: int, port: int, folder: str, event: Callable[[int], None], victim: int) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    with process_group(torch.device("cpu"), SECONDS) as context:
        begin = time.monotonic()

        def tell(message: str) -> None:
            Path(folder, f"told-by-{rank}").write_text(f"{time.monotonic() - begin}\n{message}")

        with staying(), watched(context, SECONDS, tell):
            for step in range(30):
                if step == 20:
                    event(victim)
                all_reduce_sum(torch.ones(1), context)
            all_reduce_sum(torch.ones(1), context)
        if rank == 0:  # others have left the block, and some have ended
            time.sleep(1.5 * SECONDS)
        Path(folder, f"finished-{rank}").touch()
    assert not dist.is_initialized()


class Case(NamedTuple):
    event: Callable[[int], None]
    victim: int
    world_size: int


CASES = {
    "a stopped process": Case(stop, 1, 3),
    "the stopped process has the store": Case(stop, 0, 2),
    "a blocked main thread": Case(read_slowly, 1, 3),
    "a blocked rank 0": Case(read_slowly, 0, 2),
    "a rank that has failed": Case(fail, 1, 2),
    "a slow rank": Case(pause, 1, 2),
}


class Outcome(NamedTuple):
    codes: list[int | None]  # exit code of each rank; None if it still runs
    pids: list[int | None]
    told: dict[int, str]  # by rank
    finished: set[int]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """All cases at once, since most of their time is waiting."""
    processes, folders = {}, {}
    for name, case in CASES.items():
        folders[name] = tmp_path_factory.mktemp("watch")
        port = free_port()
        processes[name] = [
            multiprocessing.get_context("fork").Process(
                target=work, args=(rank, case.world_size, port, str(folders[name]), case.event, case.victim)
            )
            for rank in range(case.world_size)
        ]
    try:
        for process in sum(processes.values(), []):
            process.start()
        for name, case in CASES.items():
            for rank, process in enumerate(processes[name]):
                if rank != case.victim or case.event in (read_slowly, pause):
                    process.join(60)
        yield {
            name: Outcome(
                [process.exitcode for process in group],
                [process.pid for process in group],
                {int(path.name[-1]): path.read_text() for path in folders[name].glob("told-by-*")},
                {int(path.name[-1]) for path in folders[name].glob("finished-*")},
            )
            for name, group in processes.items()
        }
    finally:
        for process in sum(processes.values(), []):
            process.kill()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.event is not pause])
def test_the_hung_rank_is_named_and_the_others_end(outcomes: dict[str, Outcome], name: str) -> None:
    found, case = outcomes[name], CASES[name]
    others = [rank for rank in range(case.world_size) if rank != case.victim]
    assert [found.codes[rank] for rank in others] == [1] * len(others)
    assert list(found.told) == others[:1]
    seconds, message = found.told[others[0]].split("\n")
    assert SECONDS <= float(seconds) < 10 * SECONDS
    start = f"rank {case.victim} on {socket.gethostname()} (process {found.pids[case.victim]}) "
    assert message.startswith(start)
    is_blocked = case.event is read_slowly
    what = "in read_slowly and has held up the others" if is_blocked else "has shown no sign of life"
    assert f"{what} for 3 s; look at that process and its node, or raise scaling.hang_seconds" in message
    assert not found.finished


def test_a_pause_is_not_a_hang(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["a slow rank"]
    assert found.codes == [0, 0]
    assert found.finished == {0, 1}
    assert not found.told
