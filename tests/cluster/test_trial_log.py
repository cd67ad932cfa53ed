"""Trials in MLflow: what is left when a slow server has kept the log waiting."""

import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.cluster.test_budget import plan_of, tune_trial
from tests.tuning.conftest import run_config, space_of
from tla_service.cluster import trial_log
from tla_service.cluster.trial_log import TrialLog
from tla_service.training.reporting import Terminal
from tla_service.tuning.trials import Progress


def test_a_slow_server_neither_ends_the_sweep_nor_loses_how_a_trial_ended(
    local_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, answers, printed = run_config(tracking={"uri": local_uri}), threading.Event(), StringIO()
    space = space_of({"loss.margin": {"low": 0.01, "high": 0.2}}, run=run)
    monkeypatch.setattr(trial_log, "CLOSE_SECONDS", 0.2)
    log = TrialLog(Terminal(printed), tmp_path, run, plan_of(space, tmp_path), {})
    open_run = trial_log.open_run

    def slowly(*arguments: Any, **named: Any) -> str:
        answers.wait()
        return open_run(*arguments, **named)

    monkeypatch.setattr(trial_log, "open_run", slowly)
    for number, outcome in ((0, "finished"), (1, None)):
        trial = tune_trial(number, Progress().report(outcome=outcome))
        log.on_trial_start(0, [trial], trial)
        if outcome:
            log.on_trial_complete(0, [trial], trial)
    log.close()
    assert "is slow" in printed.getvalue()
    answers.set()
    log._thread.join()
    client = MlflowClient(local_uri)
    runs = client.search_runs([client.get_run(log.run_id).info.experiment_id])
    status = {each.data.tags.get("tla.trial", "parent"): each.info.status for each in runs}
    assert status == {"parent": "FINISHED", "0": "FINISHED", "1": "KILLED"}
