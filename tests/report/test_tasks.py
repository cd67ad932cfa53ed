"""Tasks that follow from the results of others, and what is taken from before."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.report.subjects import digits
from tla_service.evaluation.shards import Arrays, Shard
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


def test_what_follows_is_measured_next_and_also_after_results_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = (Task(name, "model", "test", np.arange(5), 2, Labels()) for name in ("first", "last"))
    labels = digits().test.labels

    def follow(task: Task, found: Any) -> list[Task]:
        if task.name != "first":
            return []
        assert found == (int(labels[:5].sum()), False)
        return [replace(task, name="then", rows=np.arange(7, 9), surrogate=nn.Identity())]

    monkeypatch.setattr(Terminal, "SECONDS_BETWEEN_LINES", 0.0)
    inputs, printed = Inputs({"model": nn.Identity()}, digits()), StringIO()
    for kept, expected in [
        ("", ["first"] * 3 + ["then"] + ["last"] * 3),
        ("first", ["then"] + ["last"] * 3),
        ("then", ["first"] * 3 + ["last"] * 3),
    ]:
        for path in tmp_path.glob("shards/model/*"):
            if not kept or not path.name.startswith(kept):
                path.unlink()
        here = Noting()
        results, tasks = run_tasks([first, last], inputs, tmp_path, here, Terminal(printed), follow)
        assert here.measured == expected
        assert [task.name for task in tasks] == ["first", "last", "then"] or kept == "first"
        assert results == {
            ("model", "first"): (int(labels[:5].sum()), False),
            ("model", "last"): (int(labels[:5].sum()), False),
            ("model", "then"): (int(labels[7:9].sum()), True),
        }
        assert printed.getvalue().splitlines()[-1] == f"{len(expected)}/{len(expected)}  last"
