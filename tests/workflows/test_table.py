"""A table on a real Ray cluster: trained as a grid, killed, resumed, measured; what has finished is not repeated."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.cluster.conftest import ROOT
from tests.results.conftest import settings_of
from tests.tuning.conftest import trial_of
from tla_service.cluster.attempts import read_trials
from tla_service.cluster.placement import Placement
from tla_service.results import tuned
from tla_service.results.runs import is_trained, rounds, table_space
from tla_service.tuning.trials import Trial
from tla_service.workflows import table as table_module

FLAGS = "--table digits --seeds 1 --scaling.address local --side_by_side 1 --no-log"
SHORT = ("--budget", "2", "--methods", "at", "tla")


def table(folder: Path, *more: str) -> "subprocess.Popen[str]":
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TLA_", "RAY_", "MLFLOW_"))}
    variables |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "jobs" / "reproduce_paper.py"), *FLAGS.split(), *more]
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_killed_table_resumes_and_repeats_nothing(tmp_path: Path) -> None:
    state = tmp_path / "runs" / "tables" / "digits-2-minutes"
    storage = str(state / "ray" / "digits-2-minutes")
    first = table(tmp_path, *SHORT)
    while not any(trial.status == "finished" for trial in read_trials(storage)):
        assert first.poll() is None, first.communicate()
        time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    cut = table(tmp_path, *SHORT, "--minutes", "0.001")
    printed, _ = cut.communicate(timeout=600)
    assert cut.returncode == 75, printed
    assert (state / "at-s0" / "summary.json").exists()  # brought from the trial that had finished

    last = table(tmp_path, *SHORT)
    printed, _ = last.communicate(timeout=900)
    assert last.returncode == 0, printed
    trials = {trial.point["run"]: trial for trial in read_trials(storage)}
    assert {name: trial.status for name, trial in trials.items()} == {"at-s0": "finished", "tla-s0": "finished"}
    assert trials["at-s0"].attempts == 1
    for name in ("at-s0", "tla-s0"):
        found = json.loads((state / name / "report" / "report.json").read_text())
        assert found["accuracy"]["clean"]["images"] + found["gate"]["accuracy"]["clean"]["images"] == 20
        assert not (state / name / "report" / "shards").exists()
        (checkpoint,) = (state / name / "checkpoints").glob("step-*")
        assert not (checkpoint / "optimizer.pt").exists()
    assert "Not run yet" not in (tmp_path / "docs" / "results" / "digits.md").read_text()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_tuned_table_goes_through_all_its_rounds(tmp_path: Path) -> None:
    process = table(tmp_path, "--recipe", "tuned")
    printed, _ = process.communicate(timeout=1700)
    assert process.returncode == 0, printed
    state = tmp_path / "runs" / "tables" / "digits-tuned"
    for arm in ("at", "tla"):
        assert tuned.winner("digits", arm, state).mean > 0
        assert (state / f"{arm}-s0" / "report" / "report.json").exists()
    assert "| TLA less AT |" in (tmp_path / "docs" / "results" / "digits-tuned.md").read_text()


def test_trials_are_scored_and_one_that_diverged_fails_no_later_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one whose checkpoints have gone: it is trained again."""
    settings = settings_of("--table", "digits", "--recipe", "tuned", "--state", str(tmp_path))
    trials = [
        Trial(0, {"run": "at-t0-s1000"}, "failed", reason="the loss is not finite by step 3"),
        Trial(1, {"run": "tla-t0-s1000"}, "finished"),
        Trial(2, {"run": "at-t1-s1000"}, "failed", reason="its process died 4 times"),
    ]
    trained = []
    monkeypatch.setattr(table_module, "read_trials", lambda _: trials)
    monkeypatch.setattr(table_module, "place", lambda _: Placement(1, False, 1, 1))
    monkeypatch.setattr(table_module, "max_concurrent", lambda *_: 1)
    monkeypatch.setattr(table_module, "run_trials", lambda plan, *_, **__: trained.append(len(plan.space.grid())))
    runs = next(rounds(settings, tmp_path))
    space = table_space(settings, runs)
    for number in (1, 2):
        assert table_module._train(settings, space, runs[:2], tmp_path, math.inf) is None
        assert trained.pop() == 3 - number
    assert is_trained(tmp_path / "at-t0-s1000")
    error = table_module._train(settings, space, runs, tmp_path, math.inf)
    assert str(error).startswith("run=at-t1-s1000: training failed (its process died 4 times)")
    trials.append(trial_of(3, [0.4, 0.6, 0.5], point={"run": "tla-t1-s1000"}, status="finished"))
    (tmp_path / "ray" / space.name / "trials" / space.trial(3, trials[3].point, 1).name / "step-8").mkdir(parents=True)
    (tmp_path / "tla-t1-s1000").mkdir()
    for name in ("fetch_checkpoint", "slim"):
        monkeypatch.setattr(table_module, name, Mock())
    table_module._train(settings, space, runs, tmp_path, math.inf)
    assert tuned.scored_trials("digits", "tla", tmp_path)[0].scores == (0.6,)
