"""Faults by name. Each strikes a run at a drawn moment, does what an operator would, and leaves a job that goes on."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.world import Node, Nodes, World, nodes, run
from tests.cluster.conftest import BIN, Job
from tests.cluster.gate import Gate
from tests.cluster.test_chaos import SECONDS, SLOWER, train_workers
from tests.cluster.test_neighbours import Head

FLAGS = (*SLOWER, "--training.log_every_steps", "1", "--scaling.num_workers", "2", "--evaluation.every_epochs", "3")
LAST_STEP = 90  # of 120: the latest moment that is drawn
DISK = "10m"
_SOON = ("--scaling.hang_seconds", "30")
_NODE_ID = """
import ray, sys
ray.init(sys.argv[1], logging_level="error")
print(next(node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == sys.argv[2]))
"""


@dataclass
class Struck:
    """A run to which something happens.

    Attributes:
        stack: Closed when the run is over.
        began: When the fault struck, in seconds since the epoch.
        jobs: The command's processes, the last of which is to finish.
    """

    world: World
    name: str
    rng: random.Random
    folder: Path
    stack: ExitStack
    began: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    cluster: Nodes | None = None
    storage: str = ""
    flags: tuple[str, ...] = ()

    @property
    def job(self) -> Job:
        """The newest."""
        return self.jobs[-1]

    def start(self) -> Job:
        """Give the command, the first time or again."""
        storage = self.storage or f"s3://{self.world.s3.bucket}/{self.name}"
        named = ("--scaling.storage", storage, "--tracking.registered_model", f"tla-{self.name}")
        address = {} if self.cluster is None else {"RAY_ADDRESS": self.cluster.address}
        job = Job(self.folder, *FLAGS, *named, *self.flags, environment=self.world.environment | address)
        self.stack.callback(job.end)
        self.jobs.append(job)
        return job

    def strike(self, latest: int = LAST_STEP) -> None:
        """Return at the moment that is drawn: after a step up to the `latest`, and a part of the next one."""
        step, deadline = self.rng.randint(8, latest), time.monotonic() + SECONDS
        while self.step < step:
            assert self.job.process.poll() is None, self.job.wait()
            assert time.monotonic() < deadline, f"no step {step}"
            time.sleep(0.02)
        time.sleep(self.rng.uniform(0, 1))
        self.began = time.time()

    @property
    def step(self) -> int:
        """The last step that the log knows."""
        return max((int(record["step"]) for record in self.job.records() if record["event"] == "step"), default=0)

    def on_nodes(self) -> Nodes:
        """Let the run use nodes with networks of their own."""
        self.cluster = self.stack.enter_context(nodes(2, self.world.environment))
        return self.cluster

    def victim(self) -> Node:
        """A node of the cluster."""
        assert self.cluster is not None
        return self.rng.choice(self.cluster.nodes)


def worker_kill(struck: Struck) -> None:
    """A worker is killed."""
    struck.start()
    struck.strike()
    os.kill(struck.rng.choice(train_workers(struck.job)), signal.SIGKILL)


def driver_kill(struck: Struck) -> None:
    """The command is killed, and given again."""
    struck.start()
    struck.strike()
    struck.job.process.kill()
    struck.job.process.wait()
    struck.start()


def node_kill(struck: Struck) -> None:
    """A node is lost; another one comes."""
    cluster = struck.on_nodes()
    struck.start()
    struck.strike()
    struck.victim().kill()
    time.sleep(struck.rng.uniform(0, 20))
    cluster.add()


def preemption(struck: Struck) -> None:
    """A node goes away with a notice of 5 seconds; another one comes."""
    cluster = struck.on_nodes()
    struck.start()
    struck.strike(LAST_STEP // 2)
    node = struck.victim()
    command = [str(BIN / "python"), "-c", _NODE_ID, cluster.address, node.address]
    node_id = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    drain = f"drain-node --address {cluster.address} --node-id {node_id}"
    why = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 5"
    run(str(BIN / "ray"), *drain.split(), *why.split())
    cluster.add()
    time.sleep(5)
    assert struck.job.process.poll() is None, "the run ended before the node"
    node.kill()


def network_cut(struck: Struck) -> None:
    """A node loses its network, while what runs on it goes on; another one comes."""
    cluster, struck.flags = struck.on_nodes(), _SOON
    struck.start()
    struck.strike()
    struck.victim().cut()
    cluster.add()


def hung_rank(struck: Struck) -> None:
    """A worker is stopped, and never goes on."""
    struck.flags = _SOON
    struck.start()
    struck.strike()
    os.kill(struck.rng.choice(train_workers(struck.job)), signal.SIGSTOP)


def tracking_outage(struck: Struck) -> None:
    """The tracking server is away for up to a minute."""
    _away(struck, struck.world.to_tracking)


def storage_outage(struck: Struck) -> None:
    """The object store is away for up to a minute, also in the middle of an upload."""
    _away(struck, struck.world.to_s3)


def _away(struck: Struck, gate: Gate) -> None:
    struck.start()
    struck.strike()
    gate.shut()
    try:
        time.sleep(struck.rng.uniform(5, 60))
    finally:
        gate.open()


def torn_checkpoint(struck: Struck) -> None:
    """The command is killed and its newest checkpoint damaged: cut, changed in one byte, or without a file.

    If it was the only one, the command ends with 3, its folder is deleted as the message says, and the run starts over.
    """
    driver = struck.start()
    struck.strike()
    driver.process.kill()
    driver.process.wait()
    driver.end()
    client, bucket = struck.world.s3.client, struck.world.s3.bucket
    found = client.list_objects_v2(Bucket=bucket, Prefix=f"{struck.name}/")["Contents"]
    manifests = sorted(each["Key"] for each in found if each["Key"].endswith("/manifest.json"))
    folder = manifests[-1].rpartition("/")[0]
    files = sorted(each["Key"] for each in found if each["Key"].startswith(f"{folder}/") and each["Size"])
    key = struck.rng.choice(files)
    content = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    place = struck.rng.randrange(len(content))
    kind = struck.rng.choice(("cut", "changed", "deleted"))
    if kind == "deleted":
        client.delete_object(Bucket=bucket, Key=key)
    else:
        content[place] ^= 1 << struck.rng.randrange(8)
        client.put_object(Bucket=bucket, Key=key, Body=bytes(content[:place] if kind == "cut" else content))
    struck.start()
    if len(manifests) > 1:
        return
    printed = struck.job.wait(SECONDS)
    assert struck.job.process.returncode == 3, printed
    assert f"delete {bucket}/{struck.name}/" in printed.splitlines()[-1]
    for each in client.list_objects_v2(Bucket=bucket, Prefix=f"{struck.name}/")["Contents"]:
        client.delete_object(Bucket=bucket, Key=each["Key"])
    struck.start()


def disk_full(struck: Struck) -> None:
    """The disk of the checkpoints is full; the command ends with 3, room is made, and it is given again."""
    disk = struck.folder / "disk"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk))
    struck.stack.callback(run, "umount", "--lazy", str(disk))
    struck.storage = str(disk)
    struck.start()
    struck.strike()
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    printed = struck.job.wait(SECONDS)
    assert struck.job.process.returncode == 3, printed
    assert str(disk) in printed.splitlines()[-1]
    filler.unlink()
    struck.start()


def second_head(struck: Struck) -> None:
    """Another Ray cluster is started and stopped on the same machine."""
    struck.start()
    struck.strike(LAST_STEP // 4)
    head = Head()
    try:
        head.wait_for_dashboard()
        time.sleep(struck.rng.uniform(5, 10))
        assert struck.job.process.poll() is None, "the run ended before the other cluster could harm it"
    finally:
        head.end()


def second_driver(struck: Struck) -> None:
    """The same command is given twice at once; the second ends with 2."""
    first = struck.start()
    struck.strike()
    second = struck.start()
    printed = second.wait(SECONDS)
    assert second.process.returncode == 2, printed
    struck.jobs.remove(second)
    assert struck.job is first


FAULTS: dict[str, Callable[[Struck], None]] = {
    each.__name__: each
    for each in (
        worker_kill, node_kill, driver_kill, preemption, network_cut, hung_rank, tracking_outage, storage_outage,
        torn_checkpoint, disk_full, second_head, second_driver,
    )
}  # fmt: skip


@contextlib.contextmanager
def struck_run(world: World, seed: int, name: str, folder: Path) -> Iterator[Struck]:
    """A run at which the fault of a seed can strike."""
    with ExitStack() as stack:
        yield Struck(world, name, random.Random(seed), folder, stack)
