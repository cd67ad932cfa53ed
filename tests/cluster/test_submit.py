"""Jobs submitted to a Ray cluster that is there already, with data and checkpoints in a real S3 store."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import BIN, QUICK, ROOT, Cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def submit(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    address = f"http://127.0.0.1:{cluster.dashboard_port}"
    command = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--"]
    return subprocess.run(
        [*command, "python", "jobs/train_tla.py", *arguments],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    started = Cluster()
    yield started
    started.end()


def test_a_submitted_job_succeeds_and_its_log_is_readable(cluster: Cluster, tmp_path: Path) -> None:
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    done = submit(cluster, *QUICK, "--output", str(tmp_path / "run"), "--tracking.uri", tracking)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    told = [line for line in done.stdout.splitlines() if line.startswith(("epoch", "clean accuracy", "model"))]
    assert len(told) == 6, done.stdout
    assert "succeeded" in done.stdout


def test_a_submitted_job_that_fails_fails_the_command(cluster: Cluster, tmp_path: Path) -> None:
    done = submit(cluster, *QUICK, "--output", str(tmp_path / "run"), "--mining.pool", "bach")
    assert done.returncode != 0
    assert "mining.pool=bach: not one of batch, separate" in done.stdout + done.stderr
    assert "Traceback (most recent call last)" not in done.stdout


def test_more_workers_than_the_cluster_has_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    arguments = ("--output", str(tmp_path / "run"), "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    done = submit(cluster, *QUICK, *arguments, "--scaling.num_workers", "5")
    assert done.returncode != 0
    assert "scaling.num_workers=5: cannot be placed: a worker needs 1 CPU on one node" in done.stdout + done.stderr
