"""Where a table's runs are worked on: processes of this machine, or what else can take a stage and end it."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Stage = Literal["train", "measure"]
LOST: Literal["lost"] = "lost"  # the place is gone, not the run: what it has handed over is gone on from
PRINTED = "printed.txt"


@dataclass(frozen=True)
class Work:
    """One stage of a run.

    Attributes:
        name: Folder of the run, below the table's state.
        stage: What is to be done.
        surrogate: Folder of the run that transfer attacks are crafted on; measuring reads it.
    """

    name: str
    stage: Stage
    surrogate: str | None = None

    def command(self, state: Path) -> list[str]:
        """Arguments of Python that do it, with the table's state in a folder."""
        folder = state / self.name
        if self.stage == "measure":
            return ["-m", "tla_service.results.measure", str(folder)]
        return ["-m", "tla_service.training", "--config", str(folder / "run.yaml"), "--output", str(folder)]


class Running(Protocol):
    """Work under way."""

    def poll(self) -> int | Literal["lost"] | None:
        """The exit code once it has ended and its files are in the state folder, `LOST`, or None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end; returns at once."""

    def finish(self, seconds: float) -> int | Literal["lost"]:
        """Wait for its end, at most this long, then make it end; returns what `poll` would."""


class Places(Protocol):
    """Room for work."""

    @property
    def count(self) -> int:
        """How much at a time."""

    def start(self, work: Work, state: Path) -> Running:
        """Begin, from the files in the state folder."""

    def __str__(self) -> str:
        """For people."""


@dataclass(frozen=True)
class LocalPlaces:
    """Processes of this machine, which share its cores and its GPU.

    Attributes:
        count: How many at a time; cores are shared out between them.
    """

    count: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.count} at a time"

    def start(self, work: Work, state: Path) -> Running:
        """A process that works in the state folder itself."""
        threads = max(1, (os.cpu_count() or 1) // self.count)
        return LocalRunning(start_process(work, state, threads, {}))


class LocalRunning:
    """A process of this machine.

    Args:
        process: The process.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        """The exit code, or None."""
        return self._process.poll()

    def stop(self) -> None:
        """Send SIGTERM: training writes a checkpoint, measuring loses its shard."""
        self._process.terminate()

    def finish(self, seconds: float) -> int:
        """Wait; kill it when the time is up."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def start_process(work: Work, state: Path, threads: int, variables: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start work in a process of its own, which appends what it prints to `printed.txt`.

    Args:
        work: What.
        state: The table's state folder.
        threads: Threads of its arithmetic.
        variables: More environment variables.
    """
    with (state / work.name / PRINTED).open("ab") as printed:
        return subprocess.Popen(
            [sys.executable, *work.command(state)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | variables,
        )
