"""How many trials fit, by arithmetic on nodes."""

import pytest

from tla_service.cluster import slots
from tla_service.cluster.session import Placement
from tla_service.cluster.slots import Room, check_room
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


@pytest.mark.parametrize(
    ("cpus", "most", "on_deck", "limit"),
    [(8, None, 0, 4), (8, None, 1, 5), (8, 2, 1, 2), (8, 4, 1, 5), (8, 6, 1, 5), (0, None, 1, 1)],
)
def test_trials_under_way(
    monkeypatch: pytest.MonkeyPatch, cpus: int, most: int | None, on_deck: int, limit: int
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": float(cpus)}}, {"Alive": False, "Resources": {"CPU": 100.0}}]
    monkeypatch.setattr(slots.ray, "nodes", lambda: nodes)
    room = Room(Placement(2, False, 1, 1), most, on_deck)
    assert room.limit() == limit
    assert room.slots == min(cpus // 2, most or 100)


def test_nothing_is_on_deck_before_every_place_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    room = Room(Placement(2, False, 1, 1), None, 1)
    assert [room.limit(trained) for trained in (0, 1, 2)] == [2, 2, 3]


def test_room_follows_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    monkeypatch.setattr(slots.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(slots, "ASK_SECONDS", -1.0)
    room = Room(Placement(2, False, 1, 1), None, 1)
    assert room.limit() == 2
    nodes.append({"Alive": True, "Resources": {"CPU": 4.0}})
    assert room.limit() == 4
    nodes.pop()
    assert (room.limit(), room.slots) == (2, 3)
