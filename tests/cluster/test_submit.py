"""Jobs submitted to a Ray cluster that is there already, with data and checkpoints in a real S3 store."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import QUICK, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Cluster:
    """A head node on ports and in a folder of its own."""

    def __init__(self) -> None:
        # Ray's sockets need a short path.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.port, self.dashboard_port = free_port(), free_port()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TLA_"))}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}"}
        ports = f"--port {self.port} --dashboard-port {self.dashboard_port} --ray-client-server-port {free_port()}"
        command = f"start --head --block --num-cpus 2 --disable-usage-stats --temp-dir {self.folder} {ports}"
        self.process = subprocess.Popen(
            [str(BIN / "ray"), *command.split()],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.dashboard_port), 1):
                return
            time.sleep(0.5)
        pytest.fail("the cluster did not come up")

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        address = f"http://127.0.0.1:{self.dashboard_port}"
        command = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--"]
        return subprocess.run(
            [*command, "python", "jobs/train_tla.py", *arguments],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def end(self) -> None:
        """Kill every process of this cluster: they name its folder, or are in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            if str(self.folder) in line:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line.split()[0]), signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    started = Cluster()
    yield started
    started.end()


def test_a_submitted_job_succeeds_and_its_log_is_readable(cluster: Cluster, tmp_path: Path) -> None:
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    done = cluster.submit(*QUICK, "--output", str(tmp_path / "run"), "--tracking.uri", tracking)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    told = [line for line in done.stdout.splitlines() if line.startswith(("epoch", "clean accuracy", "model"))]
    assert len(told) == 6, done.stdout
    assert "succeeded" in done.stdout


def test_a_submitted_job_that_fails_fails_the_command(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.submit(*QUICK, "--output", str(tmp_path / "run"), "--mining.pool", "bach")
    assert done.returncode != 0
    assert "mining.pool=bach: not one of batch, separate" in done.stdout + done.stderr
    assert "Traceback (most recent call last)" not in done.stdout


def test_more_workers_than_the_cluster_has_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    arguments = ("--output", str(tmp_path / "run"), "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    done = cluster.submit(*QUICK, *arguments, "--scaling.num_workers", "5")
    assert done.returncode != 0
    assert "scaling.num_workers=5: needs 5 x 1 = 5 CPUs, the cluster has 2" in done.stdout + done.stderr
