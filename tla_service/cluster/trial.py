"""What runs in a trial's process under Ray Tune: one Ray Train run, whose progress is reported to Ray Tune."""

import os
from collections.abc import Mapping
from typing import Any

from ray import tune
from torch import Tensor

from tla_service.cluster.session import Placement
from tla_service.cluster.train import Record, fit_on_ray
from tla_service.errors import UnavailableError
from tla_service.tuning.space import Space
from tla_service.tuning.trials import Progress

QUEUE_SECONDS = 7 * 24 * 3600
# In the last line of a worker's error. A restart would end the same way.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def run_trial(
    config: Mapping[str, Any], space: Space, placement: Placement, storage: str, weights: Mapping[str, Tensor] | None
) -> None:
    """Train one trial (`config` has its `number` and `point`) from its last checkpoint, or from `weights`.

    `storage` is the folder or s3:// prefix of the checkpoints of all trials.
    """
    # A trial waits for its resources as long as the others take, instead of asking again every minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(QUEUE_SECONDS))
    progress = Progress()

    def follow(record: Record) -> None:
        message = progress.add(record)
        if message is None:
            return
        tune.report(progress.report(message))
        if record["event"] == "failure" and any(words in message.lower() for words in _OUT_OF_MEMORY):
            raise MemoryError(message)

    try:
        run = space.trial(config["trial"]["number"], config["trial"]["point"], placement.num_workers)
        result, _ = fit_on_ray(run, placement, storage, follow, weights, measure_test=space.sweep.measure_test)
    except UnavailableError as error:  # storage or data are away: that ends the sweep, and the trial can be resumed
        tune.report(progress.report(outcome="unavailable", reason=error.reason, error=error.args))
        return
    except Exception as error:  # noqa: BLE001 - whatever ends a trial is recorded with it and does not end the sweep
        tune.report(progress.report(outcome="failed", reason=reason_of(error)))
        return
    # A run that had finished before an interruption reports no epoch again: its history does.
    progress.add_history(result.history)
    tune.report(progress.report(outcome="finished", test=result.test))


def reason_of(error: Exception) -> str:
    """An error in one line, with its class unless it is one of ours."""
    text = " ".join(str(error).split())[:500]
    return text if type(error).__module__.startswith("tla_service.") else f"{type(error).__name__}: {text}"
