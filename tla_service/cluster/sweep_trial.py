"""What runs in a trial's process under Ray Tune: one Ray Train run, whose records go to the sweep's driver."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from ray import tune
from torch import Tensor

from tla_service.cluster.session import Placement
from tla_service.cluster.train import Record, fit_on_ray
from tla_service.config import RunConfig

PLACE_SECONDS = 7 * 24 * 3600
# What to look for in the last line of a worker's error. Another attempt would meet the same end.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def run_trial(
    settings: Mapping[str, str],
    placement: Placement,
    storage: str,
    weights: Mapping[str, Tensor] | None,
    measure_test: bool,  # noqa: FBT001 - Ray Tune passes it on
) -> None:
    """Train one trial; it goes on from its last checkpoint if it was begun before.

    Args:
        settings: `run`, the trial's run as JSON.
        placement: Workers and their resources.
        storage: Folder or s3:// prefix for the checkpoints of all trials.
        weights: State dict to start from.
        measure_test: Whether to measure the best weights on the test set.
    """
    # A trial on deck waits for its place as long as the others take, instead of asking anew every minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(PLACE_SECONDS))
    run = RunConfig.model_validate_json(settings["run"])
    tell({"event": "begin"})
    try:
        result, _ = fit_on_ray(run, placement, storage, _follow, weights, measure_test=measure_test)
    except Exception as error:  # noqa: BLE001 - whatever ends a trial is recorded with it and does not end the sweep
        tell({"event": "failed", "reason": reason_of(error)})
        return
    tell({"event": "end", "history": result.history, "test": result.test, "wall_seconds": result.wall_seconds})


def tell(record: Record) -> None:
    """Send a record to the driver, as one string: Ray Tune would take nested values apart."""
    tune.report({"record": json.dumps({**record, "time": time.time()})})


def reason_of(error: Exception) -> str:
    """An error in one line, with its kind unless it is one of ours."""
    text = " ".join(str(error).split())[:500]
    return text if type(error).__module__.startswith("tla_service.") else f"{type(error).__name__}: {text}"


def _follow(record: Record) -> None:
    if record["event"] == "step":
        return
    tell(record)
    message: Any = record.get("message", "")
    if any(words in message.lower() for words in _OUT_OF_MEMORY):
        raise MemoryError(message)
