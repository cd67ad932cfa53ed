"""The job as a user runs it, a process with folders of its own, and a Ray cluster that is there already."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# Ray's workers give way to every other process by default, and a test beside them would starve them.
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
MARK = "TLA_TEST_JOB"  # variable by which processes that a job has started are known
QUICK = shlex.split(
    "--preset digits --data.train_limit 200 --data.test_limit 40 --training.epochs 4 --evaluation.every_epochs 1 "
    "--training.global_batch_size 50"
)


class Job:
    """A job in a process, by default one that trains, in a folder of its own.

    Args:
        folder: Where it runs: its tracking store and its output are there.
        arguments: What to add to the quick run.
        environment: Variables to set.
        script: The job.
        preset: The quick run, or what else to begin the command line with.
        output: Output folder, if not `output` in `folder`.
    """

    printed = ""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        script: str = "train_tla.py",
        preset: Sequence[str] = QUICK,
        output: Path | None = None,
    ) -> None:
        self.folder, self.output = folder, output or folder / "output"
        self.arguments = [*preset, "--output", str(self.output), *arguments]
        command = [sys.executable, str(ROOT / "jobs" / script), *self.arguments]
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith(("TLA_", "RAY_", "MLFLOW_"))
        }
        self._mark = uuid.uuid4().hex
        variables |= {**RAY, "MLFLOW_DISABLE_TELEMETRY": "true", MARK: self._mark}
        variables |= environment or {}
        # A file: nobody reads a pipe meanwhile, and a job that has filled one waits.
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end` closes it
        self.process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=self._printed, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, seconds: float = 240) -> str:
        """What it printed, once it has ended."""
        self.process.wait(timeout=seconds)
        self._printed.seek(0)
        return self._printed.read()

    def wait_for_epoch(self, epoch: int, seconds: float = 180) -> None:
        """Return as soon as the log tells of an epoch with a checkpoint."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            told = [record["metrics"]["epoch"] for record in self.records() if record["event"] == "epoch"]
            if told and max(told) >= epoch:
                return
            if self.process.poll() is not None:
                pytest.fail(f"the job ended early:\n{self.wait()}")
            time.sleep(0.2)
        pytest.fail(f"no epoch {epoch} within {seconds} seconds")

    def records(self) -> list[dict[str, Any]]:
        """What the log holds so far; a line being written is left out."""
        path = self.output / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def summary(self) -> dict[str, Any]:
        """The summary it wrote."""
        return dict(json.loads((self.output / "summary.json").read_text()))

    def end(self) -> None:
        """Kill what is left of it and of the Ray session it started.

        They are known by their mark. Once the job has been waited for, its id may be that of another process group.
        """
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    process.kill()
        self.process.wait()
        self._printed.close()


class Cluster:
    """A head node on ports and in a folder of its own.

    Args:
        environment: Variables that its workers have.
    """

    def __init__(self, **environment: str) -> None:
        # Ray's sockets need a short path.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.port, self.dashboard_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TLA_"))}
        self.environment |= {**RAY, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
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
            time.sleep(0.1)
        pytest.fail("the cluster did not come up")

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


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(*arguments: str, **options: Any) -> Job:
        jobs.append(Job(tmp_path, *arguments, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()
