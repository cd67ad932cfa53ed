"""Runs of a table side by side; what has finished is never repeated."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tla_service.config.loading import to_yaml
from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import write_whole
from tla_service.job import INTERRUPTED
from tla_service.results.measure import MEASURED, ORDER
from tla_service.results.places import LOST, PRINTED, Places, Running, Stage, Work
from tla_service.results.settings import ReproduceSettings
from tla_service.results.tables import Unit, measures, run_config
from tla_service.training.checkpoint import MANIFEST, keep_best_only
from tla_service.training.output import SUMMARY

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
        write_whole(mark, json.dumps(mine))
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
    """Keeps places busy until all is done or time is up.

    Args:
        settings: The table.
        places: Where runs are worked on.
        say: Told of progress.
    """

    settings: ReproduceSettings
    places: Places
    say: Callable[[str], None]
    running: dict[tuple[str, Stage], Running] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    losses: Counter[str] = field(default_factory=Counter)

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
            log = self.settings.state_folder / name / PRINTED
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
        """Fill free places; whether there is more to do."""
        found = self._next(todo)
        while found is not None and len(self.running) < self.places.count:
            unit, stage = found
            self.running[unit.name, stage] = self._begin(unit, stage)
            self.say(f"{unit.name}: {stage}")
            found = self._next(todo)
        return found is not None

    def _begin(self, unit: Unit, stage: Stage) -> Running:
        state = self.settings.state_folder
        folder = state / unit.name
        folder.mkdir(exist_ok=True)
        config = run_config(self.settings, unit)
        if stage == "train":
            write_whole(folder / "run.yaml", to_yaml(config))
        else:
            for name in (unit.name, unit.surrogate):
                if name is not None:
                    _slim(state / name)
            order: dict[str, Any] = {"settings": measures(self.settings, unit), "root": config.data.root}
            write_whole(folder / ORDER, json.dumps(order | {"surrogate": unit.surrogate}, indent=1))
        return self.places.start(Work(unit.name, stage, unit.surrogate if stage == "measure" else None), state)

    def _reap(self) -> None:
        for (name, stage), running in list(self.running.items()):
            code = running.poll()
            if code is None:
                continue
            del self.running[name, stage]
            if code == LOST:
                self._lose(name, stage)
                continue
            if code != 0:
                self.failed[name] = f"{stage} ended with exit code {code}"
            self.say(f"{name}: {stage} done" if code == 0 else f"{name}: {self.failed[name]}")

    def _lose(self, name: str, stage: Stage) -> None:
        """A worker died with its work: another goes on from what it had handed over, a few times."""
        self.losses[name] += 1
        allowed = self.settings.scaling.max_failures
        if self.losses[name] > allowed:
            self.failed[name] = f"{stage} lost its worker more than scaling.max_failures={allowed} times"
        self.say(f"{name}: {self.failed.get(name, f'{stage} lost its worker; it goes on elsewhere')}")

    def _stop(self) -> None:
        """Ask what still runs to save and end."""
        for running in self.running.values():
            running.stop()
        for (name, _), running in self.running.items():
            if running.finish(_STOP_SECONDS) not in (0, INTERRUPTED):
                self.say(f"{name}: stopped")
        self.running.clear()


def _slim(folder: Path) -> None:
    """Of a finished run keep the best weights alone, so that the state is small enough to carry."""
    checkpoints = sorted(path.parent for path in (folder / "checkpoints").glob(f"*/{MANIFEST}"))
    for old in checkpoints[:-1]:
        shutil.rmtree(old)
    for newest in checkpoints[-1:]:
        keep_best_only(newest)
