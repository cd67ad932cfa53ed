"""A table on a real Ray cluster: trained as a grid, killed, resumed, measured; what has finished is not repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT
from tla_service.cluster.attempts import read_trials

FLAGS = "--table digits --budget 2 --seeds 1 --methods at tla --scaling.address local --side_by_side 1 --no-log"


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
    first = table(tmp_path)
    while not any(trial.status == "finished" for trial in read_trials(storage)):
        assert first.poll() is None, first.communicate()
        time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    cut = table(tmp_path, "--minutes", "0.001")
    printed, _ = cut.communicate(timeout=600)
    assert cut.returncode == 75, printed
    assert (state / "at-s0" / "summary.json").exists()  # brought from the trial that had finished

    last = table(tmp_path)
    printed, _ = last.communicate(timeout=900)
    assert last.returncode == 0, printed
    trials = {trial.point["run"]: trial for trial in read_trials(storage)}
    assert {name: trial.status for name, trial in trials.items()} == {"at-s0": "finished", "tla-s0": "finished"}
    assert trials["at-s0"].attempts == 1
    for name in ("at-s0", "tla-s0"):
        found = json.loads((state / name / "report" / "report.json").read_text())
        assert found["accuracy"]["clean"]["images"] + found["gate"]["accuracy"]["clean"]["images"] == 20
        assert not (state / name / "report" / "shards").exists()
        (checkpoint,) = (state / name / "checkpoints").iterdir()
        assert not (checkpoint / "optimizer.pt").exists()
    assert "Not run yet" not in (tmp_path / "docs" / "results" / "digits.md").read_text()
