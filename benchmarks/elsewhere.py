"""Candidates in a separate process, for settings that are fixed for the lifetime of a process."""

import gc
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

Candidates = Iterable[tuple[str, Callable[[], object]]]


class Elsewhere:
    """A candidate in another process: calling it runs it there once.

    Args:
        name: Its name there.
        connection: To that process.

    Attributes:
        cpu_seconds: CPU time of its runs so far, which this process's clock does not see.
    """

    def __init__(self, name: str, connection: Any) -> None:
        self._name, self._connection = name, connection
        self.cpu_seconds = 0.0

    def __call__(self) -> None:
        """Run it once.

        Raises:
            Exception: What it raised, with the other process's traceback as a note.
            RuntimeError: The other process is gone.
        """
        try:
            self._connection.send(self._name)
        except ConnectionError:
            raise RuntimeError("the other process is gone") from None
        self.cpu_seconds += _answer(self._connection)


@contextmanager
def elsewhere(make: Callable[..., Candidates], *arguments: Any) -> Iterator[dict[str, Elsewhere]]:
    """Build candidates in a new process, and run them there one at a time.

    It has one thread, this one's cores, no garbage collector, and the C library's allocator as it comes. It ends with
    the block or with this process, after the run it is at.

    Args:
        make: Builds the candidates there; a function of a module, which can be pickled.
        *arguments: What it is given; they travel pickled.

    Yields:
        The candidates by name.

    Raises:
        Exception: What building them raised.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, make, arguments), daemon=True)
    process.start()
    there.close()  # so that the pipe ends with the process
    try:
        yield {name: Elsewhere(name, here) for name in _answer(here)}
    finally:
        # Told, because closing might not be noticed: loader processes forked meanwhile hold this end open as well.
        with suppress(ConnectionError):
            here.send(None)
        process.join()
        here.close()


def _answer(connection: Any) -> Any:
    try:
        found = connection.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError("the other process is gone") from None
    if isinstance(found, Exception):
        raise found
    return found


def _serve(connection: Any, make: Callable[..., Candidates], arguments: tuple[Any, ...]) -> None:
    """Send the candidates' names, then run the requested ones and send the CPU seconds or the exception."""
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the pipe ends when the other side does
        candidates = _outcome(lambda: dict(make(*arguments)))
        connection.send(list(candidates) if isinstance(candidates, dict) else candidates)
        gc.collect()
        gc.disable()
        while isinstance(candidates, dict) and (name := connection.recv()) is not None:
            connection.send(_outcome(partial(_cpu_seconds_of, candidates[name])))


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - it is raised where the candidate was called
        error.add_note(traceback.format_exc())
        return error


def _cpu_seconds_of(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began
