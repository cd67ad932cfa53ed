"""How many trials fit, by arithmetic on nodes."""

from typing import Any

import pytest

from tla_service.cluster import session
from tla_service.cluster.session import Placement, check_room, max_concurrent, workers_per_trial
from tla_service.config import ScalingConfig
from tla_service.errors import UnavailableError

GPU_NODE = {"CPU": 16.0, "GPU": 4.0}


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
def test_room_for_trials(nodes: list[dict[str, float]], placement: Placement, slots: int) -> None:
    assert check_room(nodes, placement) == slots


def test_what_can_never_be_placed_is_refused_with_the_arithmetic() -> None:
    message = (
        "scaling.num_workers=4: a trial can never be placed: a worker needs 1 CPU and 2 GPU on one node, .*"
        "16 CPU and 3 GPU -> 1; 16 CPU and 5 GPU -> 2; together 3 of 4"
    )
    with pytest.raises(UnavailableError, match=message):
        check_room([{"CPU": 16.0, "GPU": 3.0}, {"CPU": 16.0, "GPU": 5.0}], Placement(4, True, 1, 2))


def test_nodes_that_are_gone_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 100.0}}]
    monkeypatch.setattr(session.ray, "nodes", lambda: nodes)
    assert max_concurrent(ScalingConfig(), None, Placement(2, False, 1, 1)) == 4 + 1
    assert max_concurrent(ScalingConfig(), 3, Placement(2, False, 1, 1)) == 3
    assert max_concurrent(ScalingConfig(wait_seconds=60), 99, Placement(2, False, 1, 1)) == 99  # the cluster grows


@pytest.mark.parametrize(
    ("gpus", "scaling", "workers"),
    [(0, {}, 2), (4, {}, 1), (4, {"use_gpu": False}, 2), (0, {"use_gpu": True}, 1), (4, {"num_workers": 3}, 3)],
)
def test_a_trial_has_few_workers(
    monkeypatch: pytest.MonkeyPatch, gpus: int, scaling: dict[str, Any], workers: int
) -> None:
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": float(gpus)})
    assert workers_per_trial(ScalingConfig(**scaling)) == workers
