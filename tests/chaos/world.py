"""What the faults need: MLflow on PostgreSQL, an S3 store, gates to both, and Ray nodes with networks of their own."""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.conftest import BIN
from tests.cluster.gate import Gate, gate_to
from tests.conftest import S3Server, free_port, running_s3
from tests.registry.tracking_server import TrackingServer

BRIDGE, NETWORK = "tla-chaos", "10.213.77"
HOST = f"{NETWORK}.1"
START_SECONDS = 240


@dataclass
class World:
    """Servers that all runs of a campaign share; runs reach them through gates, which can be shut."""

    folder: Path
    s3: S3Server
    to_s3: Gate
    tracking: TrackingServer
    to_tracking: Gate

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a job."""
        keys = self.s3.environment | {"AWS_ENDPOINT_URL_S3": self.to_s3.address, "AWS_EC2_METADATA_DISABLED": "true"}
        return keys | {"MLFLOW_TRACKING_URI": self.to_tracking.address}


def run(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """A bridge that the namespaces of nodes hang on; requires root."""
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        run("ip", "addr", "add", f"{HOST}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        yield
    finally:
        run("ip", "link", "del", BRIDGE)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server; its address as MLflow takes it. It refuses to run as root."""
    data, port = folder / "postgres", free_port()
    data.mkdir()
    shutil.chown(data, "postgres", "postgres")
    as_user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
    run(*as_user, "initdb", "--auth", "trust", "--username", "mlflow", "--pgdata", str(data))
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
    control = [*as_user, "pg_ctl", "--pgdata", str(data), "--silent"]
    run(*control, "start", "--wait", "--log", str(data / "log"), "--options", options)
    try:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        run(*control, "stop", "--mode", "immediate")


@contextlib.contextmanager
def world() -> Iterator[World]:
    """All servers, in a folder of their own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tla-chaos-")))
        folder.chmod(0o755)
        stack.enter_context(network())
        store = stack.enter_context(postgres(folder))
        s3 = stack.enter_context(running_s3(folder))
        tracking = TrackingServer(folder, store, allowed="*")
        tracking.start()
        stack.callback(tracking.kill)
        to_s3 = stack.enter_context(gate_to(s3.environment["AWS_ENDPOINT_URL_S3"], HOST))
        to_tracking = stack.enter_context(gate_to(tracking.uri, HOST))
        yield World(folder, s3, to_s3, tracking, to_tracking)


@dataclass
class Node:
    """A Ray node of one CPU in a network namespace."""

    name: str
    address: str
    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        """End it with all its workers, as a machine that loses power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def cut(self) -> None:
        """Take its network away; what runs on it goes on."""
        run("ip", "link", "set", self.name, "down")


@dataclass
class Nodes:
    """A Ray cluster whose head has no CPU."""

    address: str
    temp: Path
    head: "subprocess.Popen[bytes]"
    environment: dict[str, str]
    nodes: list[Node] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))

    def add(self) -> Node:
        """Start a node."""
        number = next(self._numbers)
        name, address = f"tlac{number}", f"{NETWORK}.{number}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", name, "master", BRIDGE, "up")
        for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            run("ip", "-n", name, *command.split())
        start = f"start --address {self.address} --node-ip-address {address} --num-cpus 1 --block --disable-usage-stats"
        process = _ray(self.temp, self.environment, "ip", "netns", "exec", name, str(BIN / "ray"), *start.split())
        self.nodes.append(Node(name, address, process))
        return self.nodes[-1]

    def wait(self, count: int) -> None:
        """Until so many CPUs are there."""
        deadline = time.monotonic() + START_SECONDS
        command = [str(BIN / "ray"), "status", "--address", self.address]
        while f"/{count}.0 CPU" not in subprocess.run(command, capture_output=True, text=True, check=False).stdout:
            assert time.monotonic() < deadline, "the nodes did not come up"
            time.sleep(1)


def _ray(temp: Path, variables: dict[str, str], *command: str) -> "subprocess.Popen[bytes]":
    environment = variables | {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TLA_"))
    }
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}"}
    # The nodes share this machine's name, which may stand for the loopback address.
    environment |= {"GLOO_SOCKET_IFNAME": "eth0"} if "netns" in command else {}
    with (temp / "nodes.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


@contextlib.contextmanager
def nodes(count: int, environment: dict[str, str]) -> Iterator[Nodes]:
    """A cluster of so many nodes, whose workers have these variables; all of it is killed in the end."""
    temp = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    ports = f"--port {port} --dashboard-port {free_port()} --ray-client-server-port {free_port()}"
    start = (
        f"start --head --node-ip-address {HOST} --num-cpus 0 --block --disable-usage-stats --temp-dir {temp} {ports}"
    )
    cluster = Nodes(f"{HOST}:{port}", temp, _ray(temp, environment, str(BIN / "ray"), *start.split()), environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:  # a node that finds no head gives up
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
                break
            assert time.monotonic() < deadline, "the head did not come up"
            time.sleep(0.5)
        for number in range(count):  # at once, they would take the same names for their sockets
            cluster.add()
            cluster.wait(number + 1)
        yield cluster
    finally:
        for node in cluster.nodes:
            node.kill()
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True)
            subprocess.run(["ip", "link", "del", node.name], check=False, capture_output=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(cluster.head.pid, signal.SIGKILL)
        cluster.head.wait()
        shutil.rmtree(temp, ignore_errors=True)
