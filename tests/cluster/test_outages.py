"""A run whose storage goes away or fills up: it waits, or ends with what to do, and no restart is spent on it."""

import math
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Job
from tests.cluster.gate import Gate, gate_to
from tests.conftest import S3Server
from tla_service.training.checkpoint import find_damage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

LONG = ("--training.epochs", "40", "--attack.num_steps", "40")
AWAY_SECONDS = 44


@pytest.fixture
def gate(s3: S3Server) -> Iterator[Gate]:
    with gate_to(s3.environment["AWS_ENDPOINT_URL_S3"]) as gate:
        yield gate


def test_a_storage_that_is_away_for_a_while_costs_no_restart(
    gate: Gate, s3: S3Server, start_job: Callable[..., Job]
) -> None:
    environment = s3.environment | {"AWS_ENDPOINT_URL_S3": gate.address, "AWS_EC2_METADATA_DISABLED": "true"}
    storage = f"s3://{s3.bucket}/{uuid.uuid4().hex}"
    job = start_job(*LONG, "--scaling.storage", storage, environment=environment)
    job.wait_for_epoch(2, 600)
    gate.shut()
    time.sleep(AWAY_SECONDS)
    gate.open()
    printed = job.wait(600)
    assert job.process.returncode == 0, printed
    assert job.summary()["restarts"] == 0
    warnings = [record["message"] for record in job.records() if record["event"] == "warning"]
    assert warnings
    assert all(f"Writing {storage}/" in warning and "trying again in" in warning for warning in warnings)
    assert f"warning: {warnings[0]}" in printed
    epochs = [record["metrics"]["epoch"] for record in job.records() if record["event"] == "epoch"]
    assert epochs == list(range(40))


@pytest.mark.parametrize("how", ["slow", "cut"])
def test_a_storage_that_is_slow_or_cuts_uploads_costs_nothing(
    gate: Gate, s3: S3Server, start_job: Callable[..., Job], how: str
) -> None:
    environment = s3.environment | {"AWS_ENDPOINT_URL_S3": gate.address, "AWS_EC2_METADATA_DISABLED": "true"}
    storage = f"s3://{s3.bucket}/{uuid.uuid4().hex}"
    job = start_job(*LONG, "--scaling.storage", storage, environment=environment)
    job.wait_for_epoch(2, 600)
    if how == "slow":
        gate.rate = 20_000  # a checkpoint then takes longer than the epoch until the next
        time.sleep(AWAY_SECONDS)
        gate.rate = math.inf
    else:
        gate.cuts += [50_000 + 10_007 * number for number in range(20)]
    printed = job.wait(600)
    assert job.process.returncode == 0, printed
    assert not gate.cuts
    assert job.summary()["restarts"] == 0
    warnings = [record["message"] for record in job.records() if record["event"] in ("warning", "failure")]
    assert all(f"Writing {storage}/" in warning and "trying again in" in warning for warning in warnings)
    epochs = [record["metrics"]["epoch"] for record in job.records() if record["event"] == "epoch"]
    assert epochs == list(range(40))
    checkpoint = job.summary()["checkpoint"]
    assert not find_damage(Path(checkpoint))


def test_a_storage_that_cannot_be_written_any_more_ends_the_run_with_3_and_the_path(
    start_job: Callable[..., Job], tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    job = start_job(*LONG, "--scaling.storage", str(storage))
    job.wait_for_epoch(2, 600)
    (run,) = storage.iterdir()
    run.rename(tmp_path / "away")
    run.write_text("no folder")
    printed = job.wait(600)
    assert job.process.returncode == 3, printed
    assert "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith(f"error: scaling.storage={run}/step-")
    assert "writing failed (" in last
    assert "Not a directory" in last or "File exists" in last
    assert "failure" not in [record["event"] for record in job.records()]

    run.unlink()
    (tmp_path / "away").rename(run)
    again = start_job(*LONG, "--scaling.storage", str(storage))
    printed = again.wait(600)
    assert again.process.returncode == 0, printed
    assert "resuming from" in printed
    assert again.summary()["restarts"] == 0
