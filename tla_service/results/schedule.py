"""Runs of a table as processes side by side; what has finished is never repeated."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tla_service.config_loading import to_yaml
from tla_service.errors import ConfigError, UnavailableError
from tla_service.job import INTERRUPTED
from tla_service.results.measure import MEASURED, ORDER
from tla_service.results.settings import ReproduceSettings
from tla_service.results.tables import Unit, measures, run_config
from tla_service.training.checkpoint import MANIFEST, keep_best_only
from tla_service.training.output import SUMMARY

Stage = Literal["train", "measure"]
_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0
IDENTITY = "table.json"


def open_state(settings: ReproduceSettings) -> Path:
    """Claim the folder of the runs.

    Raises:
        ConfigError: It holds another table, or other settings.
        UnavailableError: It cannot be written.
    """
    folder, mine = settings.state_folder, {"table": settings.table, "settings": settings.budget_name}
    mark = folder / IDENTITY
    try:
        if mark.exists() and json.loads(mark.read_text()) != mine:
            raise ConfigError("state", folder, "holds another table or other settings", "choose another --state")
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(mine))
    except (OSError, ValueError) as error:
        raise UnavailableError("state", folder, f"cannot be used ({error})", "choose another --state") from error
    return folder


def is_trained(folder: Path) -> bool:
    """Whether the run's training has finished."""
    return (folder / SUMMARY).exists()


def is_measured(folder: Path) -> bool:
    """Whether the run is done."""
    return (folder / MEASURED).exists()


@dataclass
class Scheduler:
    """Keeps the machine full until all is done or time is up.

    Args:
        settings: The table.
        slots: Processes at a time; cores are shared out between them.
        say: Told of progress.
    """

    settings: ReproduceSettings
    slots: int
    say: Callable[[str], None]
    running: dict[tuple[str, Stage], subprocess.Popen[bytes]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, todo: Sequence[Unit]) -> bool:
        """Train and measure; False if the time was up before all had finished.

        Raises:
            UnavailableError: Runs failed; the others were brought to their end first.
        """
        limit = self.settings.minutes
        deadline = time.monotonic() + 60 * limit if limit is not None else float("inf")
        try:
            while self._start(todo) or self.running:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_SECONDS)
                self._reap()
        finally:
            self._stop()
        if self.failed:
            name, why = next(iter(self.failed.items()))
            log = self.settings.state_folder / name / "printed.txt"
            raise UnavailableError("run", name, f"failed ({why})", f"read {log}, then give the same command again")
        return True

    def _next(self, todo: Sequence[Unit]) -> tuple[Unit, Stage] | None:
        """Measuring comes before more training: a table grows row by row."""
        state = self.settings.state_folder
        busy = {name for name, _ in self.running} | set(self.failed)
        free = [unit for unit in todo if unit.name not in busy and not is_measured(state / unit.name)]
        for unit in free:
            others = [state / name for name in (unit.name, unit.surrogate) if name is not None]
            if all(is_trained(folder) for folder in others):
                return unit, "measure"
        return next(((unit, "train") for unit in free if not is_trained(state / unit.name)), None)

    def _start(self, todo: Sequence[Unit]) -> bool:
        """Fill free slots; whether there is more to do."""
        found = self._next(todo)
        while found is not None and len(self.running) < self.slots:
            unit, stage = found
            self.running[unit.name, stage] = self._process(unit, stage)
            self.say(f"{unit.name}: {stage}")
            found = self._next(todo)
        return found is not None

    def _process(self, unit: Unit, stage: Stage) -> subprocess.Popen[bytes]:
        folder = self.settings.state_folder / unit.name
        folder.mkdir(exist_ok=True)
        config = run_config(self.settings, unit)
        if stage == "train":
            (folder / "run.yaml").write_text(to_yaml(config))
            command = ["-m", "tla_service.training", "--config", str(folder / "run.yaml"), "--output", str(folder)]
        else:
            _slim(folder)
            order: dict[str, Any] = {"settings": measures(self.settings, unit), "root": config.data.root}
            (folder / ORDER).write_text(json.dumps(order | {"surrogate": unit.surrogate}, indent=1))
            command = ["-m", "tla_service.results.measure", str(folder)]
        threads = str(max(1, (os.cpu_count() or 1) // self.slots))
        with (folder / "printed.txt").open("ab") as printed:
            return subprocess.Popen(
                [sys.executable, *command],
                stdout=printed,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": threads},
            )

    def _reap(self) -> None:
        for (name, stage), process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name, stage]
            if code != 0:
                self.failed[name] = f"{stage} ended with exit code {code}"
            self.say(f"{name}: {stage} done" if code == 0 else f"{name}: {self.failed[name]}")

    def _stop(self) -> None:
        """Ask what still runs to save and end; training writes a checkpoint, measuring loses its shard."""
        for process in self.running.values():
            process.terminate()
        for (name, _), process in self.running.items():
            try:
                code = process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            if code not in (0, INTERRUPTED):
                self.say(f"{name}: stopped")
        self.running.clear()


def _slim(folder: Path) -> None:
    """Of a finished run keep the best weights alone, so that the state is small enough to carry."""
    checkpoints = sorted(path.parent for path in (folder / "checkpoints").glob(f"*/{MANIFEST}"))
    for old in checkpoints[:-1]:
        shutil.rmtree(old)
    for newest in checkpoints[-1:]:
        keep_best_only(newest)
