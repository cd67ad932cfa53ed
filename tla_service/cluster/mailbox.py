"""Records from workers and the controller to the driver."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tla_service.errors import OutOfMemoryError

MOST_RECORDS = 10_000  # the oldest are dropped beyond
_LOW_MEMORY = "low on memory"  # in Ray's account of a worker that its memory monitor has killed


class Mailbox:
    """Keeps records until the driver fetches them, the driver's request to stop, and the controller's to save."""

    def __init__(self) -> None:
        self._records: deque[Mapping[str, Any]] = deque(maxlen=MOST_RECORDS)
        self._stop = self._save = False

    def push(self, record: Mapping[str, Any]) -> str:
        """Add a record; returns what workers should do, as `asked`."""
        self._records.append(record)
        return self.asked()

    def fetch(self) -> list[Mapping[str, Any]]:
        """Remove and return all records."""
        records, self._records = list(self._records), deque(maxlen=MOST_RECORDS)
        return records

    def asked(self) -> str:
        """What workers should do: stop, save, or nothing."""
        return "stop" if self._stop else "save" if self._save else ""

    def stop(self) -> None:
        """Ask the workers to stop at the end of their step."""
        self._stop = True

    def save(self, *, done: bool = False) -> None:
        """Ask the workers to save a checkpoint, or tell that they have."""
        self._save = not done


class FailuresToMailbox(UserCallback):
    """Sends worker failures to the driver from Ray Train's controller, which starts seconds earlier without torch.

    `memory_remedy` is added where lack of memory may be the cause.
    """

    def __init__(self, mailbox: Any, memory_remedy: str) -> None:
        self._mailbox, self._memory_remedy = mailbox, memory_remedy

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Send the reasons; Ray Train restarts the workers."""
        reasons = {rank: reason_line(error) for rank, error in worker_exceptions.items()}
        message = f"workers failed: {reasons}"
        if "memory" in message:  # also as a possible cause, where Ray knows only that the process is gone
            message += f"; if memory was the cause: {self._memory_remedy}"
        lacking = [error for error in worker_exceptions.values() if isinstance(error, OutOfMemoryError)]
        self._mailbox.push.remote({"event": "failure", "message": message, "lacks_memory": next(iter(lacking), None)})


def reason_line(error: Exception) -> str:
    """The line of an error's text that says most: the last one, unless the worker was killed for lack of memory."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if _LOW_MEMORY in line), lines[-1])


def start_mailbox() -> Any:
    """Start a mailbox actor on this node; it reserves no resources and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray keeps a record of every call, 3 KB each up to 100,000 of them, and this actor gets several in a second.
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here, enable_task_events=False).remote()
