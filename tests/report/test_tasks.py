"""Tasks shard by shard, and what is taken from before."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.report.measured import plan
from tests.report.subjects import digits
from tla_service.data.splits import gate_images
from tla_service.evaluation.shards import Arrays, Shard
from tla_service.report.measuring import Measuring
from tla_service.report.tasks import Inputs, MeasureHere, MissingShard, Task, run_tasks
from tla_service.training.reporting import Terminal


@dataclass(frozen=True)
class Labels:
    """The sum of the images' labels."""

    def run(self, shard: Shard) -> Arrays:
        return {"sum": shard.labels.sum().numpy(), "surrogate": np.array(shard.surrogate is not None)}

    def merge(self, parts: Sequence[Arrays]) -> tuple[int, bool]:
        return sum(int(part["sum"]) for part in parts), bool(parts[0]["surrogate"])


class Noting(MeasureHere):
    """Measures here, and notes what."""

    def __init__(self) -> None:
        super().__init__()
        self.measured: list[str] = []

    def __call__(self, waiting: deque[MissingShard], inputs: Inputs) -> Iterator[tuple[MissingShard, Arrays]]:
        for shard, arrays in super().__call__(waiting, inputs):
            self.measured.append(shard.task.name)
            yield shard, arrays


def test_autoattack_on_no_image_of_the_gate_is_told(tmp_path: Path) -> None:
    """The first image of a class never is one, and a few of ten classes are such."""
    subject = SimpleNamespace(key="model", config=None, network=nn.Identity())
    data = replace(digits(), gate=gate_images(digits().test.labels))
    models: Any = SimpleNamespace(subject=subject, all=(subject,), dataset=data, surrogate=None)
    for count, told in ((5, True), (40, False)):
        printed = StringIO()
        few = plan(images={"autoattack": count, "representation": 0})
        Measuring(few, models, tmp_path, Terminal(printed)).tasks()
        assert ("to promote the model, take 40 (images.autoattack)" in printed.getvalue()) == told


def test_what_was_measured_before_is_taken_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Task("first", "model", "test", np.arange(5), 2, Labels())
    last = replace(first, name="last", rows=np.arange(7, 9), surrogate=nn.Identity())
    labels = digits().test.labels
    monkeypatch.setattr(Terminal, "SECONDS_BETWEEN_LINES", 0.0)
    inputs = Inputs({"model": nn.Identity()}, digits())
    for kept, expected in [("", ["first"] * 3 + ["last"]), ("first", ["last"]), ("last", ["first"] * 3)]:
        for path in tmp_path.glob("shards/model/*"):
            if not kept or not path.name.startswith(kept):
                path.unlink()
        here, printed = Noting(), StringIO()
        results, tasks = run_tasks([first, last], inputs, tmp_path, here, Terminal(printed))
        assert tasks == [first, last]
        assert here.measured == expected
        assert results == {
            ("model", "first"): (int(labels[:5].sum()), False),
            ("model", "last"): (int(labels[7:9].sum()), True),
        }
        lines = printed.getvalue().splitlines()
        assert lines[0].startswith(f"{len(expected)} shards to measure")
        assert lines[-1] == f"{len(expected)}/{len(expected)}  {expected[-1]}"


def test_results_are_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    """On a cluster they are complete in any order, and what is written in theirs should not differ."""
    tasks = [Task(name, "model", "test", np.arange(2), 2, Labels()) for name in ("first", "second", "third")]
    inputs = Inputs({"model": nn.Identity()}, digits())

    def backwards(waiting: deque[MissingShard], inputs: Inputs) -> Iterator[tuple[MissingShard, Arrays]]:
        while waiting:
            yield from MeasureHere()(deque([waiting.pop()]), inputs)

    results, _ = run_tasks(tasks, inputs, tmp_path, backwards, Terminal(StringIO()))
    assert [name for _, name in results] == ["first", "second", "third"]


def test_what_follows_is_measured_once_the_first_results_are_there(tmp_path: Path) -> None:
    """Before what waits, whether the results are new or taken from before."""
    first = Task("first", "model", "test", np.arange(4), 2, Labels())
    other, following = replace(first, name="other"), replace(first, name="following")
    told: list[Any] = []

    def then(results: Any) -> list[Task]:
        told.append(dict(results))
        return [following]

    inputs = Inputs({"model": nn.Identity()}, digits())
    expected = {("model", "first"): (int(digits().test.labels[:4].sum()), False)}
    for kept, measured in [
        ("none", ["first"] * 2 + ["following"] * 2 + ["other"] * 2),
        ("first", ["following", "other"]),
    ]:
        for path in tmp_path.glob("shards/model/*-0000000-*"):
            if not path.name.startswith(kept):
                path.unlink()
        here = Noting()
        results, tasks = run_tasks([other], inputs, tmp_path, here, Terminal(StringIO()), [first], then)
        assert here.measured == measured
        assert tasks == [first, other, following]
        assert told.pop() == expected
        assert not told
        assert {name for _, name in results} == {"first", "other", "following"}
    run_tasks([other], inputs, tmp_path, Noting(), Terminal(StringIO()), (), then)
    assert len(told) == 1
