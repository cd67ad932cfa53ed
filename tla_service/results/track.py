"""A table's runs in MLflow: logged as they are measured, and fetched again for the page and its pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tla_service.config import RunConfig
from tla_service.environment import code_facts
from tla_service.results.figures import Row, read_row
from tla_service.results.measure import AUTOATTACK, MEASURED, OUTCOME
from tla_service.results.settings import ReproduceSettings
from tla_service.results.tables import Unit, run_config
from tla_service.tracking.connection import tracking_uri
from tla_service.tracking.run_log import RunLog
from tla_service.tracking.runs import fetch_files, find_finished, finish_run, log_files, open_run

_LOGGED = "logged.txt"
_FETCHED = "from-mlflow"
_FILES = (MEASURED, OUTCOME, AUTOATTACK)


def log_runs(settings: ReproduceSettings, todo: Sequence[Unit], state: Path, say: Callable[[str], None]) -> None:
    """An MLflow run for each finished one that this store has not: its settings, its figures, each image's fate.

    Raises:
        UnavailableError: MLflow is away; the next call logs what is missing.
    """
    uri = tracking_uri(settings.tracking)
    for unit in todo:
        row = read_row(unit.name, [unit], state)
        if not row.units:
            continue
        config, key = _identity(settings, unit)
        mark = state / unit.name / _LOGGED
        # The run's own id, as the state may have been logged to another store before.
        if mark.exists() and find_finished(config, key) == mark.read_text():
            continue
        run_id = open_run(config, key, facts=code_facts())
        log = RunLog(uri, run_id, state / unit.name / "unsent")
        log.log(_metrics(row), 0)
        log.close()
        paths = [row.folders[0] / name for name in _FILES]
        log_files(uri, run_id, {path.name: path for path in paths if path.exists()})
        finish_run(uri, run_id)
        mark.write_text(run_id)
        say(f"{unit.name}: logged to run {run_id} at {uri}")


def fetch_runs(settings: ReproduceSettings, todo: Sequence[Unit], state: Path) -> Path:
    """Fetch what MLflow has of the table's finished runs, whoever made them.

    Returns:
        A folder that holds a folder of each run with its figures, as the state folder does.

    Raises:
        UnavailableError: MLflow is away.
    """
    uri, target = tracking_uri(settings.tracking), state / _FETCHED
    for unit in todo:
        run_id = find_finished(*_identity(settings, unit))
        if run_id is not None:
            fetch_files(uri, run_id, _FILES, target / unit.name)
    return target


def _identity(settings: ReproduceSettings, unit: Unit) -> tuple[RunConfig, str]:
    """The run as MLflow gets it, and its key there."""
    config = run_config(settings, unit)
    key = f"results/{settings.table}/{settings.budget_name}/{unit.name}/{config.digest}"
    return config.model_copy(update={"tracking": settings.tracking}), key


def _metrics(row: Row) -> dict[str, float]:
    (measured,) = row.measured
    found = {f"test/{name}": result["estimate"] for name, result in measured["accuracy"].items()}
    for name in ("detection", "neighbours clean", "neighbours attacked"):
        values = row.values(name)
        found |= {f"test/{name.replace(' ', '_')}": value for value in values}
    return {name: float(value) for name, value in found.items()}
