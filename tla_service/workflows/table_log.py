"""A table's runs in MLflow: logged as they are measured, and fetched again for the page and its figures."""

import json
from collections.abc import Sequence
from pathlib import Path

from tla_service.errors import UserError
from tla_service.job import code_facts
from tla_service.report.schema import AUTOATTACK_FILE, OUTCOME_FILE, REPORT_FILE
from tla_service.results.local import Say, Track
from tla_service.results.runs import REPORT, TableRun, is_finished, read_row, run_config
from tla_service.results.settings import ReproduceSettings
from tla_service.tracking.connection import check_tracking, client, tracking_uri
from tla_service.tracking.run_log import RunLog
from tla_service.tracking.runs import fetch_files, find_finished, finish_run, log_files, open_run
from tla_service.training.output import SUMMARY
from tla_service.tuning.space import Space

_LOGGED, _FETCHED = "logged.txt", "from-mlflow"
_FILES = (REPORT_FILE, OUTCOME_FILE, AUTOATTACK_FILE)


def tracker(settings: ReproduceSettings) -> Track:
    """What logs a table's finished runs, and fetches those of all machines; if MLflow is away, the state is used."""
    check_tracking(settings.tracking)

    def track(space: Space, runs: Sequence[TableRun], state: Path, say: Say) -> Path:
        try:
            return log_and_fetch(settings, space, runs, state, say)
        except UserError as error:
            say(f"{error}; the page is made from {state} meanwhile")
            return state

    return track


def log_and_fetch(settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], state: Path, say: Say) -> Path:
    """Log each finished run that MLflow does not have; fetch all it has to a folder like the state, and return that."""
    uri, target = tracking_uri(settings.tracking), state / _FETCHED
    for run in runs:
        config, mark = run_config(space, run), state / run.name / _LOGGED
        key = f"results/{settings.table}/{settings.budget_name}/{run.name}/{config.digest}"
        run_id = find_finished(config, key)
        # Compared by its id, since the state may have been logged to another store before.
        is_logged = run_id is not None and mark.exists() and mark.read_text() == run_id
        if is_finished(run, state) and not is_logged:
            run_id = open_run(config, key, facts=code_facts())
            _log(uri, run_id, run, state)
            mark.write_text(run_id)
            say(f"{run.name}: logged to MLflow run {run_id}")
        if run_id is not None and not run.is_trial:
            fetch_files(client(uri), run_id, _FILES, target / run.name / REPORT)
    return target


def _log(uri: str, run_id: str, run: TableRun, state: Path) -> None:
    folder, figures = state / run.name, dict[str, float | None]()
    paths = [folder / SUMMARY] if run.is_trial else [folder / REPORT / name for name in _FILES]
    if run.is_trial:
        figures |= json.loads((folder / SUMMARY).read_text())["validation"]
    for measured in read_row(run.name, [] if run.is_trial else [run], state).runs:
        names = [*measured.report.accuracy, "detection", "neighbours clean", "neighbours attacked"]
        figures |= {f"test/{name.replace(' ', '_')}": measured.figure(name) for name in names}
    log = RunLog(uri, run_id, folder / "unsent")
    log.log({name: value for name, value in figures.items() if value is not None}, 0)
    log.close()
    log_files(uri, run_id, {path.name: path for path in paths if path.exists()})
    finish_run(uri, run_id)
