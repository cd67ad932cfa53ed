"""Other Ray clusters on the same machine: a run neither joins them nor asks them anything."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Job
from tests.conftest import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


class Head:
    """An unrelated `ray start --head`; its dashboard takes the default port if that is free."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        ports = f"--port {free_port()} --ray-client-server-port {free_port()} --dashboard-port {_dashboard_port()}"
        command = f"start --head --block --num-cpus 0 --disable-usage-stats --temp-dir {self.folder} {ports}"
        self._log = (self.folder / "printed").open("w")
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *command.split()],
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            | {"RAY_AUTH_MODE": "disabled"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for_dashboard(self, seconds: float = 120) -> str:
        """Its address, once it is up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search("RAY_API_SERVER_ADDRESS='([^']+)'", self.printed)
            if found:
                return found[1]
            time.sleep(0.2)
        pytest.fail(f"no dashboard:\n{self.printed}")

    @property
    def printed(self) -> str:
        return (self.folder / "printed").read_text()

    def end(self) -> None:
        """Kill what it started, and nothing else."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


@pytest.fixture
def start_head() -> Iterator[Callable[[], Head]]:
    heads: list[Head] = []

    def start() -> Head:
        heads.append(Head())
        return heads[-1]

    yield start
    for head in heads:
        head.end()
        shutil.rmtree(head.folder, ignore_errors=True)


def _dashboard_port() -> int:
    """Ray's default, which every cluster announces; another one where somebody else has it."""
    with socket.socket() as probe:
        return free_port() if probe.connect_ex(("127.0.0.1", 8265)) == 0 else 8265


ASK = """
import ray
from ray.util.state import get_actor
from ray.util.state.exception import ServerUnavailable
from tla_service.cluster.session import own_dashboard, ray_session
from tla_service.config import RunConfig

with ray_session(RunConfig().scaling):
    print("workers", ray.cluster_resources()["CPU"] >= 2)
    with own_dashboard():
        try:
            get_actor("0" * 32, timeout=5)
        except ServerUnavailable:
            print("asked nobody")
"""


@pytest.mark.slow
def test_a_cluster_of_its_own_joins_no_other_and_asks_no_other_dashboard(start_head: Callable[[], Head]) -> None:
    head = start_head()
    # Ray finds a cluster that was started in its default folder; its users are told to export the dashboard's address.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(head.folder)}
    environment["RAY_API_SERVER_ADDRESS"] = head.wait_for_dashboard()
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split("\n")[:2] == ["workers True", "asked nobody"], done.stdout + done.stderr


@pytest.mark.slow
def test_a_head_started_and_stopped_beside_a_run_does_not_disturb_it(
    start_head: Callable[[], Head], start_job: Callable[..., Job]
) -> None:
    job = start_job("--training.epochs", "100000")
    job.wait_for_epoch(0, 600)
    head = start_head()
    head.wait_for_dashboard()
    time.sleep(5)  # the cleaner asks once a second
    head.end()
    job.wait_for_epoch(int(job.records()[-1].get("metrics", {"epoch": 0})["epoch"]) + 3)
    job.process.send_signal(signal.SIGINT)
    printed = job.wait()
    assert job.process.returncode == 130, printed
    events = [record["event"] for record in job.records()]
    assert "failure" not in events
    assert events.count("start") == 1
