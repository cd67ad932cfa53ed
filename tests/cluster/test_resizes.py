"""When a checkpoint is asked for, and which failures count, by the states of Ray Train's controller; without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import PreemptionError, WorkerGroupError
from ray.train.v2._internal.execution.controller.state import ReschedulingState, ResizingState, RestartingState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.preemption import PreemptionInfo

from tla_service.cluster.elastic import Resizes
from tla_service.cluster.mailbox import Mailbox

CRASH = WorkerGroupError("rank 1: killed", {1: RuntimeError("killed")})
PREEMPTED = PreemptionError(PreemptionInfo(deadline_ms=0, preempted_node_to_ranks={"n": [0]}))
RECLAIMED = WorkerGroupError("rank 1: gone", {1: RayActorError(error_msg="gone", preempted=True)})


def play(max_failures: int, *events: Any) -> None:
    """Starts as numbers of workers, and errors before a restart."""
    resizes = Resizes(None, max_failures)
    for event in events:
        if isinstance(event, int):
            resizes.after_worker_group_start([None] * event)
        else:
            resizes.after_controller_state_update(None, RestartingState(event))


@pytest.mark.parametrize(
    "events",
    [(2, CRASH, 1), (2, CRASH, 1, 2, CRASH, 1), (2, PREEMPTED, 2, PREEMPTED, 2), (2, RECLAIMED, 2), (1, 2, 1, 2)],
)
def test_a_loss_of_nodes_is_no_failure(events: tuple[Any, ...]) -> None:
    play(0, *events)


def test_failures_on_as_many_workers_as_before_count() -> None:
    events = (2, CRASH, 2, CRASH, 1, PREEMPTED, 1, CRASH, 1)
    play(2, *events)
    with pytest.raises(RuntimeError, match=r"^rank 1: killed$"):
        play(1, *events)


def test_a_group_that_fails_while_it_starts_counts_once_it_has_started() -> None:
    resizes = Resizes(None, 0)
    resizes.after_worker_group_start([None])
    resizes.after_controller_state_update(None, ReschedulingState(CRASH))
    with pytest.raises(RuntimeError):
        resizes.after_worker_group_start([None])


def test_workers_are_asked_for_a_checkpoint_before_a_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mailbox without its process; the worker saves when it has been asked three times."""
    box, questions = Mailbox(), []

    def asked() -> str:
        questions.append(box.asked())
        if len(questions) == 3:
            box.save(done=True)
        return box.asked()

    calls = {"push": box.push, "save": box.save, "asked": asked}
    mailbox = SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    resizes = Resizes(mailbox, 0)
    resizes.after_worker_group_start([None])
    resizes.after_controller_state_update(None, ResizingState(ResizeDecision(2, {"CPU": 1})))
    assert questions == ["save"] * 3
    (record,) = box.fetch()
    assert record["message"] == "the cluster has room for 2 workers (now: 1): resizing after a checkpoint"
    box.stop()
    box.save()
    assert box.asked() == "stop"
