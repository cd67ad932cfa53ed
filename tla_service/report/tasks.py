"""Measurements cut into shards, each kept as a file: an evaluation that was stopped resumes from those it finds."""

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from tla_service.data import Dataset
from tla_service.errors import UnavailableError
from tla_service.evaluation.embedding import EmbeddedImages
from tla_service.evaluation.results import BoolArray
from tla_service.evaluation.shards import Arrays, IntArray, Measurement, Shard, ShardOutcome, load_arrays, save_arrays
from tla_service.runtime import hardware
from tla_service.training.reporting import Terminal

# Part of shards' names: one more when code gives other figures, so that an interrupted evaluation does not mix them.
_NUMERICS = 3
Results = dict[tuple[str, str], Any]  # merged, by model and task name


@dataclass(frozen=True)
class Task:
    """A measurement of one model, named by the first digits of its weights' SHA-256, on some images.

    Transfer attacks are crafted on the `surrogate`, a network on the CPU in eval mode.
    """

    name: str
    model: str
    split: Literal["train", "validation", "test"]
    rows: IntArray = field(repr=False)
    shard_size: int
    measurement: Measurement
    surrogate: nn.Module | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, str]:
        """Model and name, by which the result is found."""
        return self.model, self.name

    def shards(self) -> Iterator[tuple[str, IntArray]]:
        """Each shard's file, relative to the folder of shards, and its rows."""
        for start in range(0, len(self.rows), self.shard_size):
            rows = self.rows[start : start + self.shard_size]
            # The rows are in the name: what is known of the training run, which decides on them, differs by address.
            yield f"{self.model}/{self.name}-{start:07d}-{crc32(rows.tobytes(), _NUMERICS):08x}.npz", rows


class Inputs(NamedTuple):
    """What tasks measure on: networks by the tasks' `model`, in eval mode, and images."""

    networks: Mapping[str, nn.Module]
    dataset: Dataset

    def images(self, shard: "MissingShard") -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W), uint8, and labels (n,) of a shard."""
        dataset = self.dataset
        source = dataset.test if shard.task.split == "test" else dataset.train
        if shard.task.split == "validation" and dataset.validation is not None:
            source = dataset.validation
        rows = torch.from_numpy(shard.rows)
        return source.fetch(rows), source.labels[rows]


class MissingShard(NamedTuple):
    """A shard to measure: what it belongs to, the file of its result, its images."""

    task: Task
    name: str
    rows: IntArray


class Measurer(Protocol):
    """Where shards are measured; its string says on what hardware."""

    def __call__(self, waiting: deque[MissingShard], inputs: Inputs) -> Iterator[tuple[MissingShard, Arrays]]:
        """Take shards from the left and yield each with its result, in any order."""


class MeasureHere:
    """Measures in this process, on its GPU if there is one."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __str__(self) -> str:
        return hardware(self.device)

    def __call__(self, waiting: deque[MissingShard], inputs: Inputs) -> Iterator[tuple[MissingShard, Arrays]]:
        """See `Measurer`."""
        while waiting:
            shard = waiting.popleft()
            network, surrogate = inputs.networks[shard.task.model].to(self.device), shard.task.surrogate
            surrogate = None if surrogate is None else surrogate.to(self.device)
            images, labels = inputs.images(shard)
            loaded = Shard(network, surrogate, images, labels, shard.rows, self.device)
            yield shard, shard.task.measurement.run(loaded)


class _Run:
    """Tasks that are measured: their shards that wait, and the merged results by model and task name."""

    def __init__(self, folder: Path, terminal: Terminal) -> None:
        self.folder, self.terminal = folder / "shards", terminal
        self.tasks: list[Task] = []
        self.waiting: deque[MissingShard] = deque()
        self.left: Counter[tuple[str, str]] = Counter()
        self.results: Results = {}

    def add(self, tasks: Sequence[Task]) -> None:
        """Queue shards that are missing, before those that wait; a task without is complete."""
        shards = [MissingShard(task, name, rows) for task in tasks for name, rows in task.shards()]
        missing = [shard for shard in shards if not _is_saved(self.folder / shard.name)]
        if missing:
            taken = f", {len(shards) - len(missing)} taken from before" if len(missing) < len(shards) else ""
            self.terminal.say(f"{len(missing)} shards to measure{taken}")
        self.tasks.extend(tasks)
        self.waiting.extendleft(reversed(missing))
        self.left.update(shard.task.key for shard in missing)
        for task in tasks:
            self._merge(task)

    def save(self, shard: MissingShard, arrays: Arrays) -> None:
        """Keep the result of a shard."""
        save_arrays(arrays, self.folder / shard.name)
        self.left[shard.task.key] -= 1
        self._merge(shard.task)

    def _merge(self, task: Task) -> None:
        if not self.left[task.key]:
            parts = [load_arrays(self.folder / name) for name, _ in task.shards()]
            self.results[task.key] = task.measurement.merge(parts)


def run_tasks(
    tasks: Sequence[Task],
    inputs: Inputs,
    folder: Path,
    measure: Measurer,
    terminal: Terminal,
    first: Sequence[Task] = (),
    then: Callable[[Results], Sequence[Task]] = lambda _: (),
) -> tuple[Results, list[Task]]:
    """Measure, shard by shard; returns the merged results by model and task name, and all tasks.

    What follows from the results of `first`, `then`, is measured as soon as they are there. Shards are saved under
    ``shards/`` in the folder as they come in; one that was saved before is not measured again.
    """
    run, awaited = _Run(folder, terminal), {task.key for task in first}
    run.add([*first, *tasks])
    if awaited <= run.results.keys():
        run.add(then(run.results))
        awaited = set()
    for count, (shard, arrays) in enumerate(measure(run.waiting, inputs), start=1):
        run.save(shard, arrays)
        terminal.seldom(f"{count}/{count + run.left.total()}  {shard.task.name}")
        if awaited and awaited <= run.results.keys():
            run.add(then(run.results))
            awaited = set()
    # In the tasks' order, not the one in which they were complete: some is written in the order of results.
    return {task.key: run.results[task.key] for task in run.tasks}, run.tasks


def _is_saved(path: Path) -> bool:
    """Whether a shard has a file that can be read; a damaged one is measured again."""
    with contextlib.suppress(UnavailableError):
        return bool(load_arrays(path))
    return False


def select(results: Results, tasks: Sequence[Task], chosen: BoolArray) -> Results:
    """Results of the chosen test images (N,) alone; those of training images, and the audit's, stay as they were."""
    selected = dict(results)
    for task in tasks:
        found = results[task.key]
        if task.split != "test":
            continue
        if isinstance(found, ShardOutcome | EmbeddedImages):
            selected[task.key] = found.only(chosen[task.rows])
        elif isinstance(found, np.ndarray):
            selected[task.key] = found[chosen[task.rows]]
    return selected
