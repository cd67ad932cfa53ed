"""A table's runs in MLflow: logged as they are measured, and fetched again for the page and its figures."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tla_service.config import RunConfig
from tla_service.environment import code_facts
from tla_service.errors import UserError
from tla_service.report.schema import AUTOATTACK_FILE, OUTCOME_FILE, REPORT_FILE
from tla_service.results.local import Say, Track
from tla_service.results.runs import REPORT, TableRun, run_config
from tla_service.results.settings import ReproduceSettings
from tla_service.results.statistics import read_row
from tla_service.tracking.connection import check_tracking, tracking_uri
from tla_service.tracking.run_log import RunLog
from tla_service.tracking.runs import fetch_files, find_finished, finish_run, log_files, open_run
from tla_service.tuning.space import Space

_LOGGED = "logged.txt"
_FETCHED = "from-mlflow"
_FILES = (REPORT_FILE, OUTCOME_FILE, AUTOATTACK_FILE)


def tracker(settings: ReproduceSettings) -> Track:
    """What logs a table's finished runs and fetches those of all machines; without MLflow's answer, the state is used.

    Raises:
        UnavailableError: No server answers, or it refuses.
    """
    check_tracking(settings.tracking)

    def track(space: Space, runs: Sequence[TableRun], state: Path, say: Say) -> Path:
        try:
            log_runs(settings, space, runs, state, say)
            return fetch_runs(settings, space, runs, state)
        except UserError as error:
            say(f"{error}; the page is made from {state} meanwhile")
            return state

    return track


def log_runs(
    settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], state: Path, say: Callable[[str], None]
) -> None:
    """Log each finished run that this store does not have: settings, figures, and each image's result.

    Raises:
        UnavailableError: MLflow is away; the next call logs what is missing.
    """
    uri = tracking_uri(settings.tracking)
    for run in runs:
        row = read_row(run.name, [run], state)
        if not row.runs:
            continue
        config, key = _identity(settings, space, run)
        mark = state / run.name / _LOGGED
        # Compared by its id, since the state may have been logged to another store before.
        if mark.exists() and find_finished(config, key) == mark.read_text():
            continue
        run_id = open_run(config, key, facts=code_facts())
        names = [*row.runs[0].report.accuracy, "detection", "neighbours clean", "neighbours attacked"]
        log = RunLog(uri, run_id, state / run.name / "unsent")
        log.log({f"test/{name.replace(' ', '_')}": value for name in names for value in row.values(name)}, 0)
        log.close()
        paths = [state / run.name / REPORT / name for name in _FILES]
        log_files(uri, run_id, {path.name: path for path in paths if path.exists()})
        finish_run(uri, run_id)
        mark.write_text(run_id)
        say(f"{run.name}: logged to MLflow run {run_id}")


def fetch_runs(settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], state: Path) -> Path:
    """Fetch what MLflow has of the table's finished runs, from whatever machine.

    Returns:
        A folder with the results of each run, as in the state folder.

    Raises:
        UnavailableError: MLflow is away.
    """
    uri, target = tracking_uri(settings.tracking), state / _FETCHED
    for run in runs:
        run_id = find_finished(*_identity(settings, space, run))
        if run_id is not None:
            fetch_files(uri, run_id, _FILES, target / run.name / REPORT)
    return target


def _identity(settings: ReproduceSettings, space: Space, run: TableRun) -> tuple[RunConfig, str]:
    """The configuration logged to MLflow, and the run's key there."""
    config = run_config(space, run)
    return config, f"results/{settings.table}/{settings.budget_name}/{run.name}/{config.digest}"
