"""A sweep as a user runs it, on a real Ray cluster: trials of two workers, stopped, tracked, plotted; and killed."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Job
from tests.cluster.test_chaos import train_workers
from tla_service.cluster.attempts import read_trials
from tla_service.config.loading import load_settings
from tla_service.tuning.space import key_of
from tla_service.tuning.trials import Trial

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600)]

SWEEP = shlex.split(
    "--sweep.num_samples 5 --sweep.name small --sweep.startup_trials 2 --sweep.grace_epochs 2 --training.epochs 12 "
    "--attack.num_steps 30"
)


class Sweep(Job):
    """A sweep in a folder of its own."""

    def __init__(self, folder: Path, *arguments: str, **options: Any) -> None:
        super().__init__(folder, *SWEEP, *arguments, script="tune_tla.py", **options)

    def trials(self) -> list[Trial]:
        """What its snapshots tell."""
        return read_trials(str(self.output / "ray" / "small"))

    def wait_until(self, what: Callable[[list[Trial]], bool], seconds: float = 900) -> None:
        """Return as soon as the trials are so."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if what(self.trials()):
                return
            if self.process.poll() is not None:
                pytest.fail(f"the sweep ended early:\n{self.wait()}")
            time.sleep(0.1)
        pytest.fail(f"not within {seconds} seconds: {self.trials()}")


def assert_equal_points_gave_equal_results(one: Sweep, other: Sweep) -> None:
    """Trials of the same point trained alike, as far as both got: ASHA may have stopped one of them earlier."""
    curves = {key_of(trial.point): trial.curve for trial in one.trials()}
    pairs = [(curves[key_of(t.point)], t.curve) for t in other.trials() if key_of(t.point) in curves]
    assert pairs
    assert all(a == b for pair in pairs for a, b in zip(*pair, strict=False))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    sweeps: list[Sweep] = []

    def call(*arguments: str) -> Sweep:
        sweeps.append(Sweep(tmp_path, *arguments))
        return sweeps[-1]

    yield call
    for sweep in sweeps:
        sweep.end()


@pytest.fixture(scope="module")
def neighbour() -> Iterator[None]:
    """Another cluster on this machine: Ray Train must not ask that one who is alive."""
    code = """import ray, sys
ray.init("local", num_cpus=0, include_dashboard=False)
print("up", flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(neighbour: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """The sweep when nothing is killed."""
    sweep = Sweep(tmp_path_factory.mktemp("sweep"))
    try:
        printed = sweep.wait(900)
        assert sweep.process.returncode == 0, printed
        yield sweep
    finally:
        sweep.end()


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_pictures_and_a_winner(undisturbed: Sweep) -> None:
    from mlflow import MlflowClient

    trials, output = undisturbed.trials(), undisturbed.output
    assert [trial.number for trial in trials] == list(range(5))
    assert {trial.status for trial in trials} <= {"finished", "stopped"}
    assert all(trial.attempts == 1 and not trial.test for trial in trials)
    rows = list(csv.DictReader((output / "trials.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == [trial.status for trial in trials]
    summary = json.loads((output / "sweep.json").read_text())
    assert summary["wall_seconds"] > summary["gpu_hours"] > 0
    assert {path.name for path in (output / "figures").iterdir()} == {
        "parallel_coordinates.png", "clean_and_robust.png", "importance.png",
    }  # fmt: skip

    best = load_settings(["--config", str(output / "best.yaml")]).run_config
    assert best.loss.margin == pytest.approx(summary["winner"]["loss.margin"])
    assert (best.training.epochs, best.scaling.num_workers, best.name) == (12, 2, "")

    client = MlflowClient(f"sqlite:///{undisturbed.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("tla")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.run_id == summary["run_id"]
    assert {run.data.tags["tla.trial"]: run.data.tags["tla.trial_status"] for run in children} == {
        str(trial.number): trial.status for trial in trials
    }
    assert all(run.info.status == "FINISHED" for run in runs)
    for run in children:
        trial = trials[int(run.data.tags["tla.trial"])]
        history = client.get_metric_history(run.info.run_id, "validation/robust_accuracy")
        assert [metric.step for metric in sorted(history, key=lambda metric: metric.step)] == [
            score.epochs - 1 for score in trial.curve
        ]
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"trials.csv", "sweep.json", "best.yaml", "figures"} <= artifacts


@pytest.mark.slow
def test_a_finished_sweep_is_not_repeated_and_a_larger_one_goes_on(undisturbed: Sweep) -> None:
    before = [(trial.number, trial.point, trial.status, trial.curve) for trial in undisturbed.trials()]
    again = Sweep(undisturbed.folder, "--resume", "--sweep.num_samples", "6")
    try:
        printed = again.wait(900)
        assert again.process.returncode == 0, printed
        assert "continuing: 5 trials" in printed
        assert [(t.number, t.point, t.status, t.curve) for t in again.trials()][:5] == before
        assert [trial.attempts for trial in again.trials()] == [1] * 6
    finally:
        again.end()
    refused = Sweep(undisturbed.folder)
    try:
        assert "give --resume to continue it" in refused.wait(300)
        assert refused.process.returncode == 2
    finally:
        refused.end()


@pytest.mark.slow
def test_a_trial_that_diverges_is_recorded_and_the_sweep_goes_on(start: Callable[..., Sweep]) -> None:
    space = '{"optimizer.learning_rate": [1e30, 0.005]}'
    grid = ("--sweep.searcher", "grid", "--sweep.scheduler", "none", "--training.epochs", "3")
    sweep = start("--sweep.space", space, *grid, "--sweep.max_hours", "1")
    printed = sweep.wait(900)
    assert sweep.process.returncode == 0, printed
    first, second = sweep.trials()
    assert (first.status, second.status) == ("failed", "finished")
    assert first.reason.startswith("the loss is not finite by step")
    assert json.loads((sweep.output / "sweep.json").read_text())["winner"]["trial"] == 1


@pytest.mark.chaos
def test_a_killed_driver_and_a_killed_worker_lose_nothing(start: Callable[..., Sweep], undisturbed: Sweep) -> None:
    first = start()
    # In the middle of the second trial that trains, which has a checkpoint by then.
    first.wait_until(lambda trials: sum(trial.epochs > 1 for trial in trials) > 1)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    time.sleep(5)
    first.end()
    ended = {trial.number for trial in first.trials() if trial.status != "running"}
    second = start("--resume")
    second.wait_until(lambda trials: sum(trial.attempts > 0 and trial.number not in ended for trial in trials) > 1)
    while not (victims := train_workers(second)):  # that trial may have been stopped meanwhile: then the next one's
        time.sleep(0.1)
    os.kill(victims[0], signal.SIGKILL)
    printed = second.wait(900)
    assert second.process.returncode == 0, printed
    assert_equal_points_gave_equal_results(undisturbed, second)
    trials = second.trials()
    assert [trial.number for trial in trials] == list(range(5))
    assert all(trial.status in ("finished", "stopped") for trial in trials)
    assert all(trial.attempts == 1 for trial in trials if trial.number in ended)
    assert any(trial.attempts == 2 for trial in trials)
    assert sum(trial.restarts for trial in trials) in (0, 1)


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_with_130_and_resumes(
    start: Callable[..., Sweep], undisturbed: Sweep, number: signal.Signals
) -> None:
    first = start("--sweep.num_samples", "2")
    first.wait_until(lambda trials: any(trial.epochs > 1 for trial in trials))
    first.process.send_signal(number)
    printed = first.wait(300)
    assert first.process.returncode == 130, printed
    assert "--resume continues" in printed
    second = start("--resume", "--sweep.num_samples", "2")
    printed = second.wait(900)
    assert second.process.returncode == 0, printed
    assert [trial.number for trial in second.trials()] == [0, 1]
    assert_equal_points_gave_equal_results(undisturbed, second)
