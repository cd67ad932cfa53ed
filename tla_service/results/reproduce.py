"""From settings to the page of a table."""

import importlib.util
import signal
from pathlib import Path

import torch

from tla_service.registry.environment import code_facts
from tla_service.results.figures import Row, read_row
from tla_service.results.page import write_page
from tla_service.results.schedule import Scheduler, open_state
from tla_service.results.settings import ReproduceSettings
from tla_service.results.tables import Unit, run_config, units
from tla_service.training.reporting import Terminal

UNFINISHED = 75
_LOGGED = "logged.txt"


def reproduce(settings: ReproduceSettings) -> int:
    """Train and measure what is missing, then write the page from what there is.

    Returns:
        0 when the table is whole, 75 (try again) when the time was up before.

    Raises:
        UserError: Something is wrong, or a run failed; the page is written before.
    """
    # So that the runs are told to save and end, and none is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    terminal = Terminal()
    state = open_state(settings)
    todo = list(units(settings))
    for unit in todo:
        run_config(settings, unit)  # a wrong one is refused before anything runs
    slots = settings.slots(has_gpu=torch.cuda.is_available())
    terminal.say(f"{len(todo)} runs in {state}, {slots} at a time")
    try:
        finished = Scheduler(settings, slots, terminal.say).run(todo)
    finally:
        page = write_page(settings)
        terminal.say(f"page  {page}")
    if settings.log and importlib.util.find_spec("mlflow") is not None:
        _log(settings, todo, state, page, terminal)
    if not finished:
        terminal.say("the time is up; the same command goes on")
        return UNFINISHED
    return 0


def _log(settings: ReproduceSettings, todo: list[Unit], state: Path, page: Path, terminal: Terminal) -> None:
    """An MLflow run for each finished one that has none yet: its settings, its figures, the page."""
    from tla_service import registry

    uri = registry.tracking_uri(settings.tracking)
    for unit in todo:
        row = read_row(unit.name, [unit], state)
        if not row.units or (state / unit.name / _LOGGED).exists():
            continue
        config = run_config(settings, unit)
        config = config.model_copy(update={"tracking": settings.tracking})
        key = f"results/{settings.table}/{settings.budget_name}/{unit.name}/{config.digest}"
        run_id = registry.open_run(config, key, facts=code_facts())
        log = registry.RunLog(uri, run_id, state / unit.name / "unsent")
        log.log(_metrics(row), 0)
        log.close()
        files = {"measured.json": row.folders[0] / "measured.json", f"results/{page.name}": page}
        registry.log_files(uri, run_id, files)
        registry.finish_run(uri, run_id)
        (state / unit.name / _LOGGED).write_text(run_id)
        terminal.say(f"{unit.name}: logged to run {run_id} at {uri}")


def _metrics(row: Row) -> dict[str, float]:
    (measured,) = row.measured
    found = {f"test/{name}": result["estimate"] for name, result in measured["accuracy"].items()}
    for name in ("detection", "neighbours clean", "neighbours attacked"):
        values = row.values(name)
        found |= {f"test/{name.replace(' ', '_')}": value for value in values}
    return {name: float(value) for name, value in found.items()}
