"""One run on one, two, one, two and one workers, as nodes come and go: every image once per epoch, as accurate."""

import hashlib
import json
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from tests.chaos.campaign import commit, write_part
from tests.cluster.conftest import BIN, Job
from tla_service import train
from tla_service.config import RunConfig
from tla_service.config.loading import load_config_file
from tla_service.data import load_dataset, split_training

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]
PAGE = os.environ.get("TLA_TEST_PAGE")
NOTICE_SECONDS, SECONDS_PER_STEP = 20, 2.0
RUN = (
    "--preset", "digits", "--training.epochs", "20", "--training.global_batch_size", "100",
    "--training.log_every_steps", "2", "--mining.scope", "global", "--scaling.num_workers", "[1,2]",
    "--scaling.max_failures", "0", "--training.checkpoint_minutes", "0.5", "--attack.kind", "recording:attack",
    "--tracking.registered_model", "",
)  # fmt: skip
# PGD that notes the images of each step, and takes its time while a file exists.
CODE = """
import hashlib, json, os, time
from dataclasses import replace
from pathlib import Path
from tla_service.attacks import craft

FOLDER = Path({folder!r})

def attack(logits_fn, images, labels, attack, generator):
    if (FOLDER / "slowly").exists() and len(images) != 8:  # 8 are the check before the run
        with (FOLDER / f"{{os.getpid()}}.jsonl").open("a") as file:
            digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images.contiguous()]
            file.write(json.dumps([time.time(), digests]) + "\\n")
        time.sleep({seconds})
    return craft(logits_fn, images, labels, replace(attack, kind="pgd", function=None), generator)
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Its head runs no workers."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def wait_for_start(job: Job, number: int, seconds: float = 900) -> dict[str, Any]:
    """The record of the start of an attempt, once it has done some steps."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        records = job.records()
        starts = [place for place, record in enumerate(records) if record["event"] == "start"]
        if len(starts) > number and any(record["event"] == "step" for record in records[starts[number] :]):
            return records[starts[number]]
        assert job.process.poll() is None, job.wait()
        time.sleep(0.5)
    raise AssertionError(f"no start {number} within {seconds} seconds: {job.records()}")


def drain(cluster: Cluster, node: Any) -> None:
    """Announce the end of a node, wait, and kill it."""
    command = f"drain-node --address {cluster.address} --node-id {node.node_id} --reason DRAIN_NODE_REASON_PREEMPTION"
    notice = f"--reason-message spot --deadline-remaining-seconds {NOTICE_SECONDS}"
    subprocess.run([str(BIN / "ray"), *command.split(), *notice.split()], check=True)
    time.sleep(NOTICE_SECONDS + 1)
    cluster.remove_node(node, allow_graceful=False)


def starts_of(job: Job) -> list[dict[str, Any]]:
    return [record for record in job.records() if record["event"] == "start"]


def images_of_steps(job: Job, folder: Path) -> dict[int, Counter[str]]:
    """Digests of the images that each step of the final weights was made of, over all workers."""
    starts = starts_of(job)
    first = [int(Path(start["resumed_from"] or "step-0").name.removeprefix("step-")) for start in starts]
    steps: dict[int, Counter[str]] = {}
    for path in folder.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        # Workers report their start before their first step, and attempts are many seconds apart.
        attempt = sum(start["time"] < lines[0][0] + 3 for start in starts) - 1
        lasting = first[attempt + 1] if attempt + 1 < len(starts) else 10**9
        for step, (_, digests) in enumerate(lines, first[attempt]):
            if step < lasting:  # what followed the checkpoint was done again
                steps.setdefault(step, Counter()).update(digests)
    return steps


def check_every_image_once(recorded: dict[int, Counter[str]], config: RunConfig, last_resize: int) -> None:
    """Check all epochs that were recorded to their end."""
    dataset = load_dataset(config.data)
    rows, _ = split_training(dataset, config.data.validation_fraction, config.seed)
    images = dataset.train.fetch(rows).float() / 255
    every = Counter(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images)
    steps = -(-len(rows) // config.training.global_batch_size)
    assert sorted(recorded) == list(range(len(recorded)))
    epochs = len(recorded) // steps
    assert epochs * steps > last_resize
    for epoch in range(epochs):
        found: Counter[str] = Counter()
        for step in range(epoch * steps, (epoch + 1) * steps):
            found += recorded[step]
        assert found == every, epoch


def part(seconds: list[float], sizes: list[list[int]], elastic: float, fixed: list[float]) -> str:
    """Its part of the page."""
    lines = ["| event | workers afterwards | from step | seconds to the next start |", "|---|---|---|---|"]
    events = (
        "start",
        "a node comes",
        f"a node leaves with {NOTICE_SECONDS} s notice",
        "a node comes",
        "a node is killed",
    )
    for event, (step, workers), passed in zip(events, sizes, [None, *seconds], strict=True):
        lines.append(f"| {event} | {workers} | {step} | {'' if passed is None else f'{passed:.1f}'} |")
    spread = f"{100 * statistics.mean(fixed):.1f}% (standard deviation {100 * statistics.stdev(fixed):.1f})"
    accuracy = f"Robust accuracy {100 * elastic:.1f}%; on one worker, {len(fixed)} seeds, {spread}."
    return "\n".join([*lines, "", f"{accuracy} At {commit()}."]) + "\n"


def robust_accuracy(summary: dict[str, Any]) -> float:
    return float(summary["robust_accuracy"]["worst"])


def test_nodes_come_and_go_and_no_image_is_lost_or_seen_twice(
    cluster: Cluster, start_job: Callable[..., Job], tmp_path: Path
) -> None:
    """With TLA_TEST_PAGE=docs/reliability.md, the figures are written there."""
    code, slowly = tmp_path / "code", tmp_path / "slowly"
    code.mkdir()
    (code / "recording.py").write_text(CODE.format(folder=str(tmp_path), seconds=SECONDS_PER_STEP))
    slowly.touch()
    cluster.add_node(num_cpus=1)
    job = start_job("--model.code", str(code), preset=RUN, environment={"RAY_ADDRESS": cluster.address})
    assert wait_for_start(job, 0)["workers"] == 1
    seconds: list[float] = []
    for number, event in enumerate(("added", "drained", "added again", "killed"), 1):
        began = time.time()
        if event.startswith("added"):
            node = cluster.add_node(num_cpus=1)
        elif event == "drained":
            drain(cluster, node)
            began += NOTICE_SECONDS
        else:
            newest = max(job.output.glob("ray/*/step-*"))
            while max(job.output.glob("ray/*/step-*")) == newest:  # or its steps would leave no trace
                time.sleep(0.5)
            began = time.time()
            cluster.remove_node(node, allow_graceful=False)
        start = wait_for_start(job, number)
        assert start["workers"] == (2 if event.startswith("added") else 1), start
        seconds.append(start["time"] - began)
    time.sleep(20 * SECONDS_PER_STEP)  # more than an epoch
    recorded = images_of_steps(job, tmp_path)
    slowly.unlink()
    printed = job.wait(900)
    assert job.process.returncode == 0, printed
    assert "Traceback" not in printed

    config, sizes = load_config_file(job.output / "config.yaml"), starts_of(job)[-1]["sizes"]
    assert [workers for _, workers in sizes] == [1, 2, 1, 2, 1]
    check_every_image_once(recorded, config, sizes[-1][0])
    client = MlflowClient(f"sqlite:///{job.folder}/mlflow.db")
    points = client.get_metric_history(job.summary()["run_id"], "workers")
    assert sorted([point.step, point.value] for point in points) == sizes
    assert job.summary()["facts"]["workers"] == "1, then 2, then 1, then 2, then 1"
    for change in ("room for 2 workers (now: 1)", "on 2 workers (before: 1)", "on 1 worker (before: 2)"):
        assert printed.count(change) == 2, printed

    fixed = []
    for seed in range(4):
        other = config.model_copy(update={"seed": seed, "name": ""})
        fixed.append(robust_accuracy(train(other, tmp_path / f"seed-{seed}")))
    elastic = robust_accuracy(job.summary())
    if PAGE is not None:
        write_part(Path(PAGE), "elastic", part(seconds, sizes, elastic, fixed))
    assert abs(elastic - statistics.mean(fixed)) < 3 * max(statistics.stdev(fixed), 0.01)
