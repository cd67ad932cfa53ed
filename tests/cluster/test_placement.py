"""How many workers a cluster gives a run, and what is refused where they do not fit."""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from tla_service.cluster.placement import Placement, check_room, max_concurrent, place, waiting, workers_per_trial
from tla_service.cluster.tasks import Workers, _result
from tla_service.config import RunConfig, ScalingConfig
from tla_service.errors import ConfigError, UnavailableError

GPU_NODE = {"CPU": 16.0, "GPU": 4.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes nodes of these resources the cluster."""

    def be(*nodes: dict[str, float]) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])

    return be


def test_a_pool_that_the_clusters_gpus_cannot_share_is_refused(cluster: Callable[..., None]) -> None:
    """Of `auto` workers nobody knows the number before the cluster tells."""
    mining = {"pool": "separate", "scope": "global", "pool_size": 500}
    run = RunConfig.model_validate({"mining": mining})
    cluster({"GPU": 3.0, "CPU": 16.0})
    with pytest.raises(ConfigError, match=r"mining\.pool_size=500: not divisible by 3 workers.*; use 498 or 501"):
        place(run)
    cluster(GPU_NODE)
    assert place(run).num_workers == 4


def test_cuda_graphs_need_a_gpu_on_the_cluster(cluster: Callable[..., None]) -> None:
    run = RunConfig.model_validate({"speed": {"cuda_graphs": True}, "scaling": {"num_workers": 1}})
    cluster({"CPU": 16.0})
    with pytest.raises(ConfigError, match=r"speed\.cuda_graphs=True: CUDA graphs need a GPU"):
        place(run)


@pytest.mark.parametrize(
    ("nodes", "placement", "slots"),
    [
        ([{"CPU": 2.0}], Placement(2, False, 1, 1), 1),
        ([{"CPU": 8.0}, {"CPU": 3.0}], Placement(2, False, 1.5, 1), 3),
        ([{"CPU": 0.0}, GPU_NODE, GPU_NODE], Placement(2, True, 1, 1), 4),
        ([GPU_NODE], Placement(1, True, 1, 0.5), 8),
        ([GPU_NODE], Placement(1, True, 1, 0.3), 12),
        # Shares of 0.6 do not add up on one GPU.
        ([GPU_NODE], Placement(1, True, 1, 0.6), 4),
        ([GPU_NODE], Placement(1, True, 1, 0.1), 16),
        ([GPU_NODE, GPU_NODE], Placement(1, True, 1, 2), 4),
        ([{"CPU": 8.0, "GPU": 3.0}] * 2, Placement(2, True, 1, 2), 1),
    ],
)
def test_room_for_trials(
    cluster: Callable[..., None], nodes: list[dict[str, float]], placement: Placement, slots: int
) -> None:
    cluster(*nodes)
    assert check_room(placement) == slots


def test_workers_that_cannot_be_placed_are_refused_with_the_arithmetic(cluster: Callable[..., None]) -> None:
    cluster({"CPU": 16.0, "GPU": 3.0}, {"CPU": 16.0, "GPU": 5.0})
    message = (
        "scaling.num_workers=4: cannot be placed: a worker needs 1 CPU and 2 GPU on one node, .*"
        "16 CPU and 3 GPU -> 1; 16 CPU and 5 GPU -> 2; together 3 of 4; .* set scaling.wait_seconds"
    )
    run = RunConfig.model_validate({"scaling": {"num_workers": 4, "gpus_per_worker": 2}})
    with pytest.raises(UnavailableError, match=message):
        place(run)
    assert place(RunConfig.model_validate({"scaling": run.scaling.model_dump() | {"wait_seconds": 9}})).num_workers == 4


def test_a_range_needs_room_for_its_fewest_workers_and_a_step_that_divides_among_all(
    cluster: Callable[..., None],
) -> None:
    run = RunConfig.model_validate({"scaling": {"num_workers": [2, 8]}})
    cluster({"CPU": 3.0})
    assert place(run).num_workers == 2
    assert Workers(run.scaling)._count == 3
    cluster({"CPU": 1.0})
    with pytest.raises(UnavailableError, match=r"scaling\.num_workers=2: cannot be placed: .*together 1 of 2"):
        place(run)


def test_validation_beside_training_needs_the_room_of_one_more_worker(cluster: Callable[..., None]) -> None:
    beside = {"async_validation": True}
    cluster({"CPU": 3.0})
    place(RunConfig.model_validate({"scaling": beside | {"num_workers": 2}}))
    message = r"scaling\.async_validation=True: no room is left beside 3 workers: .*3 CPU -> 3; leave it out, or use"
    with pytest.raises(UnavailableError, match=message):
        place(RunConfig.model_validate({"scaling": beside | {"num_workers": 3}}))
    cluster({"CPU": 16.0, "GPU": 4.0})
    assert place(RunConfig.model_validate({"scaling": beside})).num_workers == 3


@pytest.mark.parametrize(
    ("share", "cpus", "workers"),
    [(0.3, 1, 12), (0.6, 1, 4), (1, 8, 2), (0.5, 1, 8)],
)
def test_as_many_workers_as_fit(cluster: Callable[..., None], share: float, cpus: float, workers: int) -> None:
    """A share is on one GPU, and a GPU without free CPUs holds no worker."""
    cluster(GPU_NODE)
    scaling = {"gpus_per_worker": share, "cpus_per_worker": cpus}
    assert place(RunConfig.model_validate({"scaling": scaling})).num_workers == workers


def test_a_worker_that_fits_on_no_node_is_refused_though_the_cluster_has_as_much(cluster: Callable[..., None]) -> None:
    cluster({"CPU": 2.0}, {"CPU": 2.0})
    run = RunConfig.model_validate({"scaling": {"num_workers": 1, "cpus_per_worker": 3}})
    with pytest.raises(UnavailableError, match=r"scaling\.num_workers=1: cannot be placed: .*2 CPU -> 0; 2 CPU -> 0"):
        place(run)
    with pytest.raises(UnavailableError, match=r"^scaling: no worker can be placed: a worker needs 3 CPU .*; ask for"):
        Workers(run.scaling)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({}, "8 workers, 1 GPU each"),
        ({"num_workers": 3}, "3 workers, 1 GPU each"),
        ({"use_gpu": False, "cpus_per_worker": 16}, "2 workers, 16 CPU cores each"),
    ],
)
def test_an_evaluation_has_as_many_workers_as_fit(
    cluster: Callable[..., None], scaling: dict[str, Any], said: str
) -> None:
    cluster(GPU_NODE, GPU_NODE)
    assert str(Workers(ScalingConfig(**scaling))) == said


def test_what_a_run_waits_for(cluster: Callable[..., None]) -> None:
    since = time.mktime((2026, 11, 27, 4, 5, 6, 0, 0, -1))
    cluster({"CPU": 1.0})
    start = "waiting since 04:05:06 for 2 workers to be placed: a worker needs 1 CPU on one node, and the nodes have"
    lost = waiting(Placement(2, False, 1, 1), since)
    assert lost == f"{start} room for this many: 1 CPU -> 1; together 1 of 2; add nodes, and the run goes on"
    cluster({"CPU": 1.0}, {"CPU": 4.0})
    assert waiting(Placement(2, False, 1, 1), since).endswith(
        "4 CPU -> 4; other jobs may be using them, or their processes are still starting"
    )


def test_nodes_that_are_gone_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 100.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert max_concurrent(ScalingConfig(), None, Placement(2, False, 1, 1)) == 4 + 1
    assert max_concurrent(ScalingConfig(), 3, Placement(2, False, 1, 1)) == 3
    assert max_concurrent(ScalingConfig(wait_seconds=60), 99, Placement(2, False, 1, 1)) == 99  # the cluster grows


@pytest.mark.parametrize("error", [WorkerCrashedError(), NodeDiedError("gone"), OutOfMemoryError("killed")])
def test_a_shard_whose_workers_die_again_and_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", Mock(side_effect=error))
    with pytest.raises(UnavailableError, match=r"^shard=pgd-3: its worker died more often than scaling\.max_failures"):
        _result(None, "pgd-3")


@pytest.mark.parametrize(
    ("gpus", "scaling", "workers"),
    [(0, {}, 2), (4, {}, 1), (4, {"use_gpu": False}, 2), (0, {"use_gpu": True}, 1), (4, {"num_workers": 3}, 3)],
)
def test_a_trial_has_few_workers(
    cluster: Callable[..., None], gpus: int, scaling: dict[str, Any], workers: int
) -> None:
    cluster({"CPU": 16.0, "GPU": float(gpus)})
    assert workers_per_trial(ScalingConfig(**scaling)) == workers
