"""Prometheus metrics of a run, exported by Ray on the driver's node (port: ray start --metrics-export-port).

The driver sets them from the workers' records, so training never waits for them. Ray prefixes each name with `ray_`.
Gauges end with the driver; counters are kept by Ray's agent on the node.
"""

import time
from collections.abc import Mapping
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge

from tla_service.config import RunConfig

Outcome = Literal["finished", "interrupted", "loss_not_finite", "failed"]
GAUGES = {
    "tla_step": "optimiser steps done",
    "tla_total_steps": "optimiser steps of the whole run",
    "tla_epoch": "current epoch, or the last one",
    "tla_loss": "training loss, mean over the epoch so far",
    "tla_images_per_second": "training images per second, over all workers",
    "tla_clean_accuracy": "accuracy on clean validation images, a fraction",
    "tla_robust_accuracy": "accuracy on attacked validation images, a fraction",
    "tla_workers": "workers of the run",
    "tla_last_progress_timestamp_seconds": "when workers last reported anything, in seconds since 1970",
    "tla_unsent_bytes": "metrics on disk that MLflow has not confirmed",
}
COUNTERS = {
    "tla_worker_restarts_total": "restarts after worker failures",
    "tla_runs_ended_total": "runs that ended, by outcome",
}


class RunMetrics:
    """The metrics of one run, labelled with its name, method and data set. Needs a Ray session."""

    restarts = 0  # how often workers failed and others were placed
    _has_failed = False

    def __init__(self, config: RunConfig) -> None:
        labels = {"run": config.run_name, "method": config.method, "dataset": config.data.name}
        self._gauges = {name: Gauge(name, text, tuple(labels)) for name, text in GAUGES.items()}
        # Ray adds the ending itself.
        self._counters = {
            name: Counter(name.removesuffix("_total"), text, (*labels, "outcome")) for name, text in COUNTERS.items()
        }
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags(labels)

    def take(self, record: Mapping[str, Any]) -> None:
        """Update from a record: `placed`, `start`, `step`, `epoch`, `validation` or `failure`."""
        if record["event"] != "waiting":
            self._gauges["tla_last_progress_timestamp_seconds"].set(time.time())
        if record["event"] == "failure":
            self._has_failed = True
        elif record["event"] == "placed" and self._has_failed:
            self.restarts, self._has_failed = self.restarts + 1, False
            self._counters["tla_worker_restarts_total"].inc(tags={"outcome": "restarted"})
        for key, value in record.get("metrics", record).items():
            gauge = self._gauges.get(f"tla_{key.rpartition('/')[2]}")  # of "loss" as of "train/loss"
            if gauge is not None:
                gauge.set(value)

    def unsent(self, size: int) -> None:
        """Set the size of the metrics that MLflow has not confirmed, in bytes."""
        self._gauges["tla_unsent_bytes"].set(size)

    def ended(self, outcome: Outcome) -> None:
        """Count the run as ended; Ray flushes when the session closes."""
        self._counters["tla_runs_ended_total"].inc(tags={"outcome": outcome})
