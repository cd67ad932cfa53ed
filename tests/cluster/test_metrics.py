"""What a run tells Prometheus, read from Ray's exporter."""

import math
import time
from collections.abc import Iterator

import pytest
from ray.util import metrics as ray_metrics

from tla_service.cluster.metrics import COUNTERS, GAUGES, RunMetrics
from tla_service.config import RunConfig


class Recorder:
    """Stands where Ray's metric would send to its agent: there is no session here."""

    made: dict[str, "Recorder"]

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] = ()) -> None:
        self.description, self.tag_keys, self.seen = description, tag_keys, list[tuple[float, dict[str, str]]]()
        self.defaults: dict[str, str] = {}
        Recorder.made[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.defaults = tags

    def set(self, value: float) -> None:
        self.seen.append((value, self.defaults))

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.seen.append((value, self.defaults | (tags or {})))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Recorder]]:
    Recorder.made = {}
    for kind in ("Gauge", "Counter"):
        assert hasattr(ray_metrics, kind)
        monkeypatch.setattr(f"tla_service.cluster.metrics.{kind}", Recorder)
    return Recorder.made


def test_records_become_metrics_of_the_run(recorded: dict[str, Recorder]) -> None:
    config = RunConfig()
    told = RunMetrics(config)
    before = time.time()
    told.take({"event": "start", "resumed": False, "workers": 4})
    told.take({"event": "step", "epoch": 2, "step": 7, "total_steps": 9, "loss": 1.5, "images_per_second": 80.0})
    told.take({"event": "failure", "message": "workers failed: {0: 'gone'}"})
    told.take({"event": "failure", "message": "rank 0 failed alone"})  # of the same group
    told.take({"event": "placed"})
    told.take(
        {"event": "epoch", "metrics": {"epoch": 2.0, "step": 9.0, "train/loss": 1.0, "validation/robust_accuracy": 0.5}}
    )
    told.take({"event": "waiting", "message": "waiting for a node"})  # is no progress
    told.take({"event": "placed"})  # of another size
    told.take({"event": "failure", "message": "workers failed"})  # the last one, which ends the run
    told.unsent(120)
    told.ended("loss_not_finite")
    values = {name: [value for value, _ in metric.seen] for name, metric in recorded.items()}
    assert values["tla_workers"] == [4]
    assert values["tla_step"] == [7, 9.0]
    assert values["tla_total_steps"] == [9]
    assert values["tla_loss"] == [1.5, 1.0]
    assert values["tla_robust_accuracy"] == [0.5]
    assert values["tla_clean_accuracy"] == []
    assert values["tla_unsent_bytes"] == [120]
    assert all(before <= moment <= time.time() for moment in values["tla_last_progress_timestamp_seconds"])
    assert len(values["tla_last_progress_timestamp_seconds"]) == 8
    assert told.restarts == 1
    labels = {"run": config.run_name, "method": "tla", "dataset": "digits"}
    assert recorded["tla_worker_restarts"].seen == [(1.0, labels | {"outcome": "restarted"})]
    assert recorded["tla_runs_ended"].seen == [(1.0, labels | {"outcome": "loss_not_finite"})]
    assert all(seen == labels for _, seen in recorded["tla_step"].seen)
    assert set(recorded) == {name.removesuffix("_total") for name in (*GAUGES, *COUNTERS)}


def test_a_loss_that_is_no_number_does_not_stop_the_run(recorded: dict[str, Recorder]) -> None:
    RunMetrics(RunConfig()).take({"event": "step", "loss": math.nan})
    assert math.isnan(recorded["tla_loss"].seen[0][0])
