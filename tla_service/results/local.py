"""A table from its settings to its page; without Ray its runs are processes of this machine."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from tla_service.config.loading import to_yaml
from tla_service.data import load_dataset
from tla_service.data.cache import disk_trouble
from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import locked_folder, write_whole
from tla_service.job import INTERRUPTED
from tla_service.results import tuned
from tla_service.results.page import write_page
from tla_service.results.runs import (
    TableRun,
    is_finished,
    is_trained,
    record_if_diverged,
    rounds,
    run_config,
    slim,
    table_space,
    write_report_settings,
)
from tla_service.results.settings import ReproduceSettings
from tla_service.training.reporting import Terminal
from tla_service.tuning.space import Space

UNFINISHED = 75
IDENTITY, DATA, PRINTED = "table.json", "data.txt", "printed.txt"
_ON_ONE_GPU = 4  # small networks leave most of a large GPU idle
_STOP_SECONDS = 60.0
Say = Callable[[str], None]
# Trains and measures runs in a folder until a deadline of the monotonic clock; returns whether all are done.
Make = Callable[[Space, Sequence[TableRun], Path, Say, float], bool]
# Logs the finished runs, and returns the folder that the page is made from.
Track = Callable[[Space, Sequence[TableRun], Path, Say], Path]


def reproduce(settings: ReproduceSettings, make: Make, track: Track | None = None) -> int:
    """Train and measure the runs that are missing, log them, and write the page, also if one of them failed.

    Returns the job's exit code: 0, or 75 (try again) if the time was up before the table was complete.
    """
    # Runs are told to stop after a checkpoint, and none is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    page = settings.page
    with disk_trouble("output", page, "choose another --output"):  # before hours of training
        if page.is_dir():
            raise IsADirectoryError("is a folder")
        page.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=page.parent):
            pass
    with locked_folder(settings.state_folder, "state"):
        terminal, state = Terminal(), open_state(settings)
        deadline = math.inf if settings.minutes is None else time.monotonic() + 60 * settings.minutes
        for runs in rounds(settings, state):
            space = table_space(settings, runs)
            for run in runs:
                run_config(space, run)  # wrong settings are refused before anything runs
            missing = [run for run in runs if not is_finished(run, state)]
            if missing:
                # Data that is missing is reported once, not by every run.
                claim(settings, load_dataset(space.run.data).fingerprint)
            terminal.say(f"{len(runs)} runs in {state}, {len(runs) - len(missing)} of them finished")
            try:
                is_complete = not missing or make(space, missing, state, terminal.say, deadline)
            finally:
                source = track(space, runs, state, terminal.say) if track is not None else state
                if not runs[0].is_trial:
                    terminal.say(f"page  {write_page(settings, space, source, state)}")
            if not is_complete:
                terminal.say("unfinished; the same command resumes")
                return UNFINISHED
        return 0


def open_state(settings: ReproduceSettings) -> Path:
    """Claim the folder of the runs; raises ConfigError if it holds another table, or one with other settings."""
    folder, mine = settings.state_folder, {"table": settings.table, "settings": settings.budget_name}
    if settings.recipe == "tuned":
        mine["searches"] = tuned.searches_digest(settings.table)
    mark = folder / IDENTITY
    try:
        if mark.exists() and json.loads(mark.read_text()) != mine:
            raise ConfigError("state", folder, "holds another table or other settings", "choose another --state")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(mark, json.dumps(mine))
    except (OSError, ValueError) as error:
        raise UnavailableError("state", folder, f"cannot be used ({error})", "choose another --state") from error
    return folder


def claim(settings: ReproduceSettings, fingerprint: str) -> None:
    """Keep the folder of the runs for one data set; ConfigError if it was begun with another one."""
    mark = settings.state_folder / DATA
    if mark.exists() and mark.read_text() != fingerprint:
        reason = f"is not the data that the runs in {settings.state_folder} were made from"
        raise ConfigError("data.root", settings.data.root, reason, "give that data, or choose another --state")
    write_whole(mark, fingerprint)


def reproduce_here(settings: ReproduceSettings, track: Track | None = None) -> int:
    """Make a table on this machine; see `reproduce`."""

    def make(space: Space, runs: Sequence[TableRun], state: Path, say: Say, deadline: float) -> bool:
        count = settings.side_by_side or (_ON_ONE_GPU if torch.cuda.is_available() else os.cpu_count() or 1)
        return _Local(settings, space, state, say, count).make(runs, deadline)

    return reproduce(settings, make, track)


class _StoppedError(Exception):
    """A process was stopped before its end."""


class _Local:
    """Runs of a table as processes that share the cores, or the GPU, of this machine."""

    def __init__(self, settings: ReproduceSettings, space: Space, state: Path, say: Say, count: int) -> None:
        self._settings, self._space, self._state, self._say, self._count = settings, space, state, say, count
        self._lock, self._stopped = threading.Lock(), False
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._untrained, self._unmeasured = set[str](), list[TableRun]()

    def make(self, runs: Sequence[TableRun], deadline: float = math.inf) -> bool:
        """Train and measure; False if the time was up first. If a run failed, raises once the others have finished."""
        self._untrained, self._unmeasured = {run.name for run in runs}, [run for run in runs if not run.is_trial]
        with ThreadPoolExecutor(self._count) as threads:
            try:
                futures = [threads.submit(self._make, run) for run in runs]
                wait(futures, None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
            finally:
                self._stop()
        errors = [error for future in futures if (error := future.exception()) is not None]
        if any(isinstance(error, _StoppedError) for error in errors):
            return False
        for error in errors:
            raise error
        return True

    def _make(self, run: TableRun) -> None:
        """Train a run, then measure those that have only waited for it: itself, and those it is the surrogate of."""
        self._train(run)
        with self._lock:
            self._untrained.remove(run.name)
            ready = [each for each in self._unmeasured if not {each.name, each.surrogate} & self._untrained]
            self._unmeasured = [each for each in self._unmeasured if each not in ready]
        with contextlib.ExitStack() as every:  # also those after one that fails
            for each in reversed(ready):
                every.callback(self._measure, each)

    def _train(self, run: TableRun) -> None:
        folder = self._state / run.name
        if not is_trained(folder):
            folder.mkdir(exist_ok=True)
            write_whole(folder / "run.yaml", to_yaml(run_config(self._space, run)))
            command = ["tla_service.training", "--config", str(folder / "run.yaml"), "--output", str(folder)]
            try:
                self._run(run, "training", command)
            except UnavailableError as error:
                if run.is_trial and record_if_diverged(folder, error):
                    return
                raise
        slim(folder)

    def _measure(self, run: TableRun) -> None:
        path = write_report_settings(self._settings, run, self._state)
        self._run(run, "evaluation", ["tla_service.report", "--config", str(path)])
        slim(path.parent)

    def _run(self, run: TableRun, what: str, command: Sequence[str]) -> None:
        """Run a Python module to its end; raises _StoppedError if it was stopped before."""
        threads, printed = max(1, (os.cpu_count() or 1) // self._count), self._state / run.name / PRINTED
        with self._lock, printed.open("ab") as file:
            if self._stopped:
                raise _StoppedError
            self._say(f"{run.name}: {what}")
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            process = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, env=environment
            )
            self._processes.add(process)
        code = process.wait()
        if code == INTERRUPTED or (code and self._stopped):
            raise _StoppedError
        if code:
            last = (printed.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            self._say(f"{run.name}: {what} failed")
            reason = f"{what} failed with exit code {code} ({last})"
            raise UnavailableError("run", run.name, reason, f"read {printed}, then give the same command again")
        self._say(f"{run.name}: {what} done")

    def _stop(self) -> None:
        """Ask what still runs to save and end."""
        with self._lock:
            self._stopped = True
            running = [process for process in self._processes if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
