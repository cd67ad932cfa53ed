"""A table's runs in a real MLflow store: logged once each, and the page made of what the store has."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from tests.results.conftest import settings_of
from tla_service.evaluation.shards import load_outcome
from tla_service.report.schema import read_report
from tla_service.results.page import write_page
from tla_service.results.runs import TableRun, table_runs, table_space
from tla_service.results.settings import ReproduceSettings
from tla_service.tuning.space import Space
from tla_service.workflows.table_log import log_and_fetch

Finished = Callable[..., None]


def runs_of(settings: ReproduceSettings) -> tuple[Space, list[TableRun]]:
    runs = table_runs(settings)
    return table_space(settings, runs), runs


@pytest.fixture
def settings(tmp_path: Path, local_uri: str) -> ReproduceSettings:
    flags = ["--table", "digits", "--budget", "30", "--seeds", "2", "--methods", "at", "--methods", "tla"]
    flags += ["--state", str(tmp_path / "state"), "--output", str(tmp_path / "page.md")]
    return settings_of(*flags, "--tracking.uri", local_uri)


def test_the_page_is_made_of_the_runs_in_mlflow(
    tmp_path: Path, settings: ReproduceSettings, finished: Finished
) -> None:
    (space, todo), state, said = runs_of(settings), tmp_path / "state", list[str]()
    for name, robust in (("at-s0", 0.5), ("tla-s0", 0.6), ("tla-s1", 0.7)):
        finished(state, name, 0.9, robust)
    log_and_fetch(settings, space, todo, state, said.append)
    log_and_fetch(settings, space, todo, state, said.append)  # again: nothing is logged twice
    assert len(said) == 3
    made = mlflow.MlflowClient(tracking_uri=settings.tracking.uri)
    experiment = made.get_experiment_by_name("tla-results")
    runs = {run.info.run_name: run for run in made.search_runs([experiment.experiment_id])}
    assert set(runs) == {"at-s0", "tla-s0", "tla-s1"}
    logged = runs["tla-s1"].data.metrics
    assert {name: logged[f"test/{name}"] for name in ("clean", "pgd100", "worst", "autoattack")} == {
        "clean": 0.9,
        "pgd100": 0.7,
        "worst": 0.7,
        "autoattack": 0.65,
    }
    assert runs["tla-s1"].data.params["seed"] == "1"
    assert runs["tla-s1"].info.status == "FINISHED"

    # Another machine, which has no state of its own, makes the same page.
    shutil.rmtree(state)
    fetched = log_and_fetch(settings, space, todo, state, said.append)
    assert read_report(fetched / "tla-s0" / "report" / "report.json").accuracy["pgd100"].estimate == 0.6
    assert load_outcome(fetched / "at-s0" / "report" / "outcome.npz").standing("pgd100").mean() == 0.5
    page = write_page(settings, space, fetched, tmp_path).read_text()
    assert "| TLA | 2 | 90.0 [90.0, 90.0] | 65.0 [1.5, 128.5] |" in page
    assert "| AT | 1 | 90.0 | 50.0 |" in page
    assert "1 run: `at-s1`." in page
    assert "runs evaluated at 0123abcd on a processor, 2 cores; " in page


def test_figures_that_are_measured_again_replace_the_fetched_ones(
    tmp_path: Path, settings: ReproduceSettings, finished: Finished
) -> None:
    (space, todo), state = runs_of(settings), tmp_path / "state"
    finished(state, "tla-s0", 0.9, 0.6)
    log_and_fetch(settings, space, todo, state, lambda _text: None)
    shutil.rmtree(state / "tla-s0")
    finished(state, "tla-s0", 0.9, 0.4)
    fetched = log_and_fetch(settings, space, todo, state, lambda _text: None)
    assert read_report(fetched / "tla-s0" / "report" / "report.json").accuracy["pgd100"].estimate == 0.4


def test_another_store_gets_the_runs_as_well(
    tmp_path: Path, template: Path, settings: ReproduceSettings, finished: Finished
) -> None:
    (space, todo), state = runs_of(settings), tmp_path / "state"
    finished(state, "tla-s0", 0.9, 0.6)
    log_and_fetch(settings, space, todo, state, lambda _text: None)
    shutil.copy(template, tmp_path / "other.db")
    tracking = settings.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/other.db"})
    elsewhere = settings.model_copy(update={"tracking": tracking})
    elsewhere_space, _ = runs_of(elsewhere)
    log_and_fetch(elsewhere, elsewhere_space, todo, state, lambda _text: None)
    fetched = log_and_fetch(elsewhere, elsewhere_space, todo, tmp_path / "fresh", lambda _text: None)
    assert (fetched / "tla-s0" / "report" / "report.json").exists()
