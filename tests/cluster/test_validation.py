"""Validation in a task beside the workers: the same weights and metrics as a run that waits, whatever is killed."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Job
from tests.cluster.test_chaos import outcome, train_workers

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
RUN = ("--scaling.num_workers", "2", "--training.epochs", "8", "--evaluation.validation.num_steps", "40")


def validating(job: Job) -> list[int]:
    """Process ids of the job's validation task, if it runs now."""
    listing = subprocess.run(["ps", "-eo", "pid,sess,args"], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in listing.splitlines()[1:])
    return [int(pid) for pid, session, args in rows if int(session) == job.process.pid and "ray::_validate" in args]


def kill_one(job: Job, find: Callable[[Job], list[int]]) -> None:
    deadline = time.monotonic() + 300
    while not (found := find(job)):
        assert job.process.poll() is None, job.wait()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(found[0], signal.SIGKILL)


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Job]:
    """The run that waits for each validation."""
    (tmp_path / "waiting").mkdir()
    job = Job(tmp_path / "waiting", *RUN)
    yield job
    job.end()


def test_a_run_that_trains_on_during_validation_ends_as_one_that_waits(
    waiting: Job, start_job: Callable[..., Job]
) -> None:
    job = start_job(*RUN, "--scaling.async_validation")
    kill_one(job, validating)
    job.wait_for_epoch(3)
    kill_one(job, train_workers)
    for each in (waiting, job):
        printed = each.wait(600)
        assert each.process.returncode == 0, printed
        assert "Traceback" not in printed
    assert job.summary()["restarts"] == 1
    assert outcome(job) == outcome(waiting)
    assert job.summary()["validation"] == waiting.summary()["validation"]
    told = {int(record["metrics"]["epoch"]) for record in job.records() if record["event"] == "validation"}
    assert told == set(range(7)), "the last epoch's is in its own record"
