"""A node that goes away with notice: a checkpoint at once, and no restart is counted."""

import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.cluster.conftest import BIN, Job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
LONG = ("--training.epochs", "20", "--attack.num_steps", "60", "--evaluation.every_epochs", "1000")
NOTICE_SECONDS = 8


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Its head runs no workers."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_drained_node_costs_no_restart_and_only_what_follows_the_notice(
    cluster: Cluster, start_job: Callable[..., Job]
) -> None:
    node = cluster.add_node(num_cpus=2)
    # No restart is allowed, and no other checkpoint is due.
    frequent = ("--training.log_every_steps", "1", "--scaling.max_failures", "0", "--scaling.num_workers", "2")
    job = start_job(*LONG, *frequent, environment={"RAY_ADDRESS": cluster.address})
    deadline = time.monotonic() + 300
    while not any(record["event"] == "step" for record in job.records()):
        assert job.process.poll() is None, job.wait()
        assert time.monotonic() < deadline
        time.sleep(0.5)
    command = f"drain-node --address {cluster.address} --node-id {node.node_id} --reason DRAIN_NODE_REASON_PREEMPTION"
    notice = f"--reason-message spot --deadline-remaining-seconds {NOTICE_SECONDS}"
    subprocess.run([str(BIN / "ray"), *command.split(), *notice.split()], check=True)
    cluster.add_node(num_cpus=2)
    printed = job.wait(600)
    assert job.process.returncode == 0, printed
    assert f"warning: nodes are about to go away: {node.node_id}" in printed
    first, second = (record for record in job.records() if record["event"] == "start")
    assert not first["resumed"]
    assert second["resumed"]
    assert job.summary()["restarts"] == 0
    epochs = [record["metrics"]["epoch"] for record in job.records() if record["event"] == "epoch"]
    assert sorted(set(epochs)) == list(range(20))
