"""Kill what can be killed; nothing is lost and nothing is counted twice."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster.conftest import Job

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(5400)]
SLOWER = ("--training.epochs", "30", "--attack.num_steps", "40")
SECONDS = 900  # for a job that takes a minute on an idle machine


def train_workers(job: Job) -> list[int]:
    """Process ids of the job's Ray Train workers: descendants of the job, in its session."""
    listing = subprocess.run(["ps", "-eo", "pid,sess,args"], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in listing.splitlines()[1:])
    return [int(pid) for pid, session, args in rows if int(session) == job.process.pid and "RayTrainWorker" in args]


class Outcome(NamedTuple):
    """What a run has come to, whatever happened on the way.

    Attributes:
        weights: What identifies the registered weights.
        history: In MLflow, (step, value) of each metric but rates and the machine's own, in order of steps.
    """

    weights: str
    history: dict[str, list[tuple[int, float]]]


def outcome(job: Job) -> Outcome:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{job.folder}/mlflow.db")
    version = client.get_model_version("tla-digits", "1")
    run = client.get_run(job.summary()["run_id"])
    names = [
        name for name in run.data.metrics if name.startswith(("train/", "validation/", "test/", "step", "learning"))
    ]
    points = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    # In order of epochs: what a killed driver had not sent is sent at the end.
    # To ten digits: where sums are read within an epoch, they are added up in another order.
    history = {
        name: sorted((point.step, float(f"{point.value:.10g}")) for point in found) for name, found in points.items()
    }
    return Outcome(str(version.tags["weights_sha256"]), history)


def checkpoints(job: Job) -> list[Path]:
    """The run's checkpoints in its storage, oldest first."""
    return sorted(job.output.glob("ray/*/step-*"))


def finish(job: Job, expected: Outcome) -> str:
    """Wait for the end, which is to be that of the undisturbed run; returns what the job printed."""
    printed = job.wait(SECONDS)
    assert job.process.returncode == 0, printed
    assert "Traceback" not in printed
    found = outcome(job)
    assert found.weights == expected.weights
    assert found.history == expected.history
    assert len(checkpoints(job)) == 2
    return printed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same run when nothing is killed."""
    job = Job(tmp_path_factory.mktemp("undisturbed"), *SLOWER)
    try:
        printed = job.wait(SECONDS)
        assert job.process.returncode == 0, printed
        found = outcome(job)
        assert [step for step, _ in found.history["train/loss"]] == list(range(30))
        return found
    finally:
        job.end()


def test_a_killed_worker_costs_a_restart_and_nothing_else(start_job: Callable[..., Job], undisturbed: Outcome) -> None:
    job = start_job(*SLOWER)
    job.wait_for_epoch(3, SECONDS)
    victims = train_workers(job)
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    assert "resuming from" in finish(job, undisturbed)
    assert job.summary()["restarts"] == 1


def test_a_frozen_worker_is_named_and_costs_a_restart(start_job: Callable[..., Job], undisturbed: Outcome) -> None:
    job = start_job(*SLOWER, "--scaling.hang_seconds", "10")
    job.wait_for_epoch(3, SECONDS)
    victim = train_workers(job)[-1]
    os.kill(victim, signal.SIGSTOP)
    printed = finish(job, undisturbed)
    (told,) = (line for line in printed.splitlines() if "scaling.hang_seconds" in line)
    assert f" on {socket.gethostname()} (process {victim}) has shown no sign of life for 10 s; " in told
    assert "resuming from" in printed
    assert job.summary()["restarts"] == 1


def test_a_killed_driver_is_taken_up_by_the_same_command(start_job: Callable[..., Job], undisturbed: Outcome) -> None:
    first = start_job(*SLOWER)
    first.wait_for_epoch(3, SECONDS)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    second = start_job(*SLOWER)
    assert "resuming from" in finish(second, undisturbed)


def interrupted(job: Job, epoch: int) -> None:
    """Ask for a stop after an epoch, and wait for it."""
    job.wait_for_epoch(epoch, SECONDS)
    job.process.send_signal(signal.SIGINT)
    printed = job.wait(SECONDS)
    assert job.process.returncode == 130, printed
    assert job.summary()["status"] == "interrupted"
    assert Path(job.summary()["checkpoint"]).exists()


def test_an_interrupt_saves_a_checkpoint_and_ends_with_130(start_job: Callable[..., Job], undisturbed: Outcome) -> None:
    """Wherever it falls: a look at the mailbox after each step makes it fall within an epoch."""
    each_step = ("--training.log_every_steps", "1")
    interrupted(start_job(*SLOWER, *each_step), 3)
    finish(start_job(*SLOWER, *each_step), undisturbed)


def test_what_is_wrong_with_the_newest_checkpoint_costs_a_warning(
    start_job: Callable[..., Job], undisturbed: Outcome
) -> None:
    """A damaged file, a missing folder and a cut record, one after the other; in the end a damaged file in mid-run."""
    job = start_job(*SLOWER)
    interrupted(job, 3)
    damage(checkpoints(job)[-1])
    job = start_job(*SLOWER)
    interrupted(job, 8)
    assert "model.safetensors is corrupted (its checksum differs)); falling back to" in messages(job)
    shutil.rmtree(checkpoints(job)[-1])
    job = start_job(*SLOWER)
    interrupted(job, 13)
    assert "is missing; falling back to" in messages(job)
    (record,) = job.output.glob("ray/*/latest.json")
    record.write_text(record.read_text()[:10])
    job = start_job(*SLOWER)
    job.wait_for_epoch(18, SECONDS)
    assert "the record of checkpoints" in messages(job)
    # The workers are stopped for as long as it takes to damage what they have written.
    victims = train_workers(job)
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)
    newest = [path for path in checkpoints(job) if (path / "manifest.json").exists()][-1]
    damage(newest)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    finish(job, undisturbed)
    assert f"checkpoint {newest} cannot be used" in messages(job)


def damage(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def messages(job: Job) -> str:
    """All that the log says in words, of all attempts."""
    return "\n".join(str(record.get("message")) for record in job.records())


def test_when_no_checkpoint_is_whole_the_job_ends_with_3(start_job: Callable[..., Job]) -> None:
    job = start_job(*SLOWER)
    interrupted(job, 2)
    for checkpoint in checkpoints(job):
        damage(checkpoint)
    job = start_job(*SLOWER)
    printed = job.wait(SECONDS)
    assert job.process.returncode == 3, printed
    assert "Traceback" not in printed
    (told,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert f"checkpoint={checkpoints(job)[-1]}: model.safetensors is corrupted" in told
    assert "none of the older ones can be used either; restore its files, or delete" in told


def test_the_same_command_started_twice_is_refused_and_changes_nothing(
    start_job: Callable[..., Job], tmp_path: Path, undisturbed: Outcome
) -> None:
    storage = ("--scaling.storage", str(tmp_path / "storage"))
    first = start_job(*SLOWER, *storage)
    first.wait_for_epoch(1, SECONDS)
    workers = train_workers(first)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # it is not to end before the others have started
    for folder, named in ((None, "output"), (tmp_path / "elsewhere", "scaling.storage")):
        second = start_job(*SLOWER, *storage, output=folder)
        printed = second.wait(SECONDS)
        assert second.process.returncode == 2, printed
        (told,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert told.startswith(f"error: {named}=")
        assert f"in use by process {first.process.pid} on " in told
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    printed = first.wait(SECONDS)
    assert first.process.returncode == 0, printed
    assert outcome(first) == undisturbed
    assert not (tmp_path / "elsewhere" / "config.yaml").exists()
