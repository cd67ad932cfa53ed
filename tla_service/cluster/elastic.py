"""What Ray Train's elastic scaling lacks: it ends workers without notice, and counts a lost node as a failure."""

import time
from typing import Any

import ray
from ray.train import WorkerGroupError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, ResizingState, RestartingState
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure

from tla_service.cluster.mailbox import reason_line

SAVE_SECONDS = 60.0  # at most, for a checkpoint before a resize


class Resizes(ControllerCallback, WorkerGroupCallback):
    """Asks for a checkpoint before a resize, and counts failures in place of Ray Train's own failure policy.

    A failure counts if the workers afterwards are as many as before: otherwise a node has gone. Runs in the controller,
    which starts seconds earlier without torch.
    """

    def __init__(self, mailbox: Any, max_failures: int) -> None:
        self._mailbox, self._max_failures = mailbox, max_failures
        self._size = self._failures = 0
        self._cause = ""  # of a failure that is not counted yet

    def after_controller_state_update(self, _before: Any, current_state: Any) -> None:
        """Before a resize, wait for a checkpoint; after a failure, remember it."""
        if isinstance(current_state, ResizingState):
            size = current_state.scaling_decision.num_workers  # type: ignore[attr-defined]
            message = f"the cluster has room for {size} workers (now: {self._size}): resizing after a checkpoint"
            self._mailbox.push.remote({"event": "resize", "message": message})
            self._mailbox.save.remote()
            deadline = time.monotonic() + SAVE_SECONDS
            while ray.get(self._mailbox.asked.remote()) == "save" and time.monotonic() < deadline:
                time.sleep(0.1)
        elif isinstance(current_state, RestartingState | ReschedulingState):
            error = current_state.training_failed_error
            if isinstance(error, WorkerGroupError) and not _is_preemption_failure(error):
                self._cause = reason_line(error)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Count a failure that no change of size explains; raises RuntimeError after too many, which ends the run."""
        self._failures += bool(self._cause) and len(worker_group) == self._size
        if self._failures > self._max_failures:
            raise RuntimeError(self._cause)
        self._cause, self._size = "", len(worker_group)
