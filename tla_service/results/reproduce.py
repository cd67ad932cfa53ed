"""From settings to the page of a table."""

import importlib.util
import os
import signal
from pathlib import Path

import torch

from tla_service.errors import UserError
from tla_service.lock import locked_folder
from tla_service.results.page import write_page
from tla_service.results.places import LocalPlaces, Places
from tla_service.results.schedule import Scheduler, open_state
from tla_service.results.settings import ReproduceSettings
from tla_service.results.tables import Unit, run_config, units
from tla_service.training.reporting import Terminal

UNFINISHED = 75
_ON_ONE_GPU = 4  # small networks leave most of a large GPU idle


def reproduce_here(settings: ReproduceSettings) -> int:
    """Remake a table on this machine; see `reproduce`."""
    fit = _ON_ONE_GPU if torch.cuda.is_available() else os.cpu_count() or 1
    return reproduce(settings, LocalPlaces(settings.side_by_side or fit))


def reproduce(settings: ReproduceSettings, places: Places) -> int:
    """Train and measure what is missing, then write the page from what there is.

    Where MLflow is installed every finished run is logged there, and the page and its pictures are made from what
    MLflow then has.

    Returns:
        0 when the table is whole, 75 (try again) when the time was up before.

    Raises:
        UserError: Something is wrong, another process is at this table, or a run failed; the page is written before.
    """
    # So that the runs are told to save and end, and none is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with locked_folder(settings.state_folder, "state"):
        return _reproduce(settings, places)


def _reproduce(settings: ReproduceSettings, places: Places) -> int:
    terminal = Terminal()
    todo = list(units(settings))
    for unit in todo:
        run_config(settings, unit)  # a wrong one is refused before anything runs
    tracked = settings.log and importlib.util.find_spec("mlflow") is not None
    if tracked:
        from tla_service.tracking.connection import check_tracking

        check_tracking(settings.tracking)
    state = open_state(settings)
    terminal.say(f"{len(todo)} runs in {state}, {places}")
    try:
        finished = Scheduler(settings, places, terminal.say).run(todo)
    finally:
        source = _tracked(settings, todo, state, terminal) if tracked else state
        terminal.say(f"page  {write_page(settings, source)}")
    if not finished:
        terminal.say("the time is up; the same command goes on")
        return UNFINISHED
    return 0


def _tracked(settings: ReproduceSettings, todo: list[Unit], state: Path, terminal: Terminal) -> Path:
    """Log what has finished, and fetch all that MLflow has of the table; the state folder when it is away."""
    from tla_service.results.track import fetch_runs, log_runs

    try:
        log_runs(settings, todo, state, terminal.say)
        return fetch_runs(settings, todo, state)
    except UserError as error:
        terminal.say(f"{error}; the page is made from {state} meanwhile")
        return state
