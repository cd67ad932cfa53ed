"""Kill what can be killed; nothing is lost and nothing is counted twice."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.conftest import Job

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]
SLOWER = ("--training.epochs", "30", "--attack.num_steps", "40")


def train_workers(job: Job) -> list[int]:
    """Process ids of the job's Ray Train workers: descendants of the job, in its session."""
    listing = subprocess.run(["ps", "-eo", "pid,sess,args"], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in listing.splitlines()[1:])
    return [int(pid) for pid, session, args in rows if int(session) == job.process.pid and "RayTrainWorker" in args]


def weights_digest(job: Job) -> str:
    """What identifies the registered weights."""
    from mlflow import MlflowClient

    version = MlflowClient(f"sqlite:///{job.folder}/mlflow.db").get_model_version("tla-digits", "1")
    return str(version.tags["weights_sha256"])


def epochs_tracked(job: Job) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{job.folder}/mlflow.db")
    # In order of epochs: what a killed driver had not sent is sent at the end.
    return sorted(metric.step for metric in client.get_metric_history(job.summary()["run_id"], "train/loss"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the same run when nothing is killed."""
    job = Job(tmp_path_factory.mktemp("undisturbed"), *SLOWER)
    try:
        printed = job.wait()
        assert job.process.returncode == 0, printed
        return weights_digest(job)
    finally:
        job.end()


def test_a_killed_worker_costs_a_restart_and_nothing_else(start_job: Callable[..., Job], undisturbed: str) -> None:
    job = start_job(*SLOWER)
    job.wait_for_epoch(3)
    victims = train_workers(job)
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    printed = job.wait()
    assert job.process.returncode == 0, printed
    assert job.summary()["restarts"] == 1
    assert "going on from the last checkpoint" in printed
    assert epochs_tracked(job) == list(range(30))
    assert weights_digest(job) == undisturbed


def test_a_killed_driver_is_taken_up_by_the_same_command(start_job: Callable[..., Job], undisturbed: str) -> None:
    first = start_job(*SLOWER)
    first.wait_for_epoch(3)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    time.sleep(5)
    first.end()
    second = start_job(*SLOWER)
    printed = second.wait()
    assert second.process.returncode == 0, printed
    assert "going on from the last checkpoint" in printed
    assert epochs_tracked(second) == list(range(30))
    assert weights_digest(second) == undisturbed


def test_an_interrupt_saves_a_checkpoint_and_ends_with_130(start_job: Callable[..., Job], undisturbed: str) -> None:
    first = start_job(*SLOWER)
    first.wait_for_epoch(3)
    first.process.send_signal(signal.SIGINT)
    printed = first.wait()
    assert first.process.returncode == 130, printed
    assert first.summary()["status"] == "interrupted"
    assert Path(first.summary()["checkpoint"]).exists()
    second = start_job(*SLOWER)
    assert second.wait()
    assert second.process.returncode == 0
    assert epochs_tracked(second) == list(range(30))
    assert weights_digest(second) == undisturbed
