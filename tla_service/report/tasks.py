"""Measurements cut into shards: each shard's result is a few arrays, kept as a file and put together at the end."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tla_service.attacks import Attack
from tla_service.attacks.autoattack import AutoAttackNorm
from tla_service.attacks.minimum_norm import SparseNorm, minimum_norms
from tla_service.config.bounds import Norm
from tla_service.data import Batch, Dataset
from tla_service.errors import UnavailableError
from tla_service.evaluation.audit import audit
from tla_service.evaluation.embedding import Embedded, embed, embed_attacked
from tla_service.evaluation.intervals import BoolArray
from tla_service.evaluation.mode import as_pixels, evaluating, float32, logits_of
from tla_service.evaluation.outcomes import (
    Arrays,
    ShardOutcome,
    load_arrays,
    merge_outcomes,
    outcome_arrays,
    outcome_from,
    save_arrays,
)
from tla_service.evaluation.results import Audit, Check, SurrogateFacts
from tla_service.evaluation.suite import evaluate_shard
from tla_service.evaluation.surrogate import TrainedSurrogate, train_surrogate
from tla_service.inference.detector import Floats
from tla_service.runtime import hardware, mixed_seed

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """The images of one shard, and where to compute.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        rows: Number of each image in its set (N,).
        device: Where the networks are.
    """

    images: Tensor
    labels: Tensor
    rows: Rows
    device: torch.device

    def batches(self, size: int) -> Iterator[Batch]:
        """The images as float32 in [0, 1] on the device."""
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            yield Batch(as_pixels(self.images[part], self.device), self.labels[part].to(self.device))


class Measurement(Protocol):
    """Something measured shard by shard. `run` goes on in a worker, `merge` puts the shards together."""

    def run(self, network: nn.Module, surrogate: nn.Module | None, shard: Shard) -> Arrays:
        """Measure one shard."""

    def merge(self, parts: Sequence[Arrays]) -> Any:
        """The result over all shards, in their order."""


@dataclass(frozen=True)
class AttackMeasurement:
    """Per-image results of attacks; merged to a ShardOutcome."""

    attacks: Mapping[str, Attack]
    transfer: Mapping[str, Attack]
    autoattack: tuple[AutoAttackNorm, float] | None
    seed: int
    batch_size: int

    def run(self, network: nn.Module, surrogate: nn.Module | None, shard: Shard) -> Arrays:
        """Attack the images."""
        outcome = evaluate_shard(
            network,
            shard.images,
            shard.labels,
            self.attacks,
            indices=shard.rows.tolist(),
            transfer=self.transfer,
            surrogate=surrogate,
            autoattack=self.autoattack,
            seed=self.seed,
            batch_size=self.batch_size,
            device=shard.device,
        )
        return outcome_arrays(outcome)

    def merge(self, parts: Sequence[Arrays]) -> ShardOutcome:
        """The results of all images."""
        return merge_outcomes([outcome_from(part) for part in parts])


@dataclass(frozen=True)
class EmbeddedImages:
    """Embedded images, and the pixels of those that were kept.

    Attributes:
        embedded: Row by row.
        rows: Number of each image in its set (N,).
        pixels: The first images as they were embedded (n, C, H, W), float32 in [0, 1].
    """

    embedded: Embedded
    rows: Rows
    pixels: Floats

    def only(self, chosen: BoolArray) -> Self:
        """The images that are chosen (N,)."""
        where = chosen.nonzero()[0]
        pixels = self.pixels[chosen[: len(self.pixels)]]
        return replace(self, embedded=self.embedded.subset(where), rows=self.rows[where], pixels=pixels)


@dataclass(frozen=True)
class EmbeddingMeasurement:
    """Where the network puts images, natural or attacked; merged to EmbeddedImages."""

    attack: Attack | None
    seed: int
    batch_size: int
    keep_images: int = 0

    def run(self, network: nn.Module, surrogate: nn.Module | None, shard: Shard) -> Arrays:  # noqa: ARG002 - protocol
        """Embed the images."""
        batches = shard.batches(self.batch_size)
        kept: Floats | None = None
        if self.attack is None:
            found = embed(network, batches)
        else:
            seed = mixed_seed(self.seed, int(shard.rows[0]))
            found, kept = embed_attacked(network, batches, self.attack, seed, keep_images=self.keep_images)
        pixels = np.empty((0, *shard.images.shape[1:]), np.float32) if kept is None else kept
        return {
            "embeddings": found.embeddings,
            "logits": found.logits,
            "labels": found.labels,
            "rows": shard.rows,
            "pixels": pixels,
        }

    def merge(self, parts: Sequence[Arrays]) -> EmbeddedImages:
        """All embedded images."""
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        embedded = Embedded(joined["embeddings"], joined["logits"], joined["labels"])
        return EmbeddedImages(embedded, joined["rows"], joined["pixels"])


@dataclass(frozen=True)
class NormMeasurement:
    """The smallest perturbation found for each image; merged to norms (N,): 0 where wrong when clean, else infinite."""

    norm: SparseNorm
    batch_size: int
    steps: int = 100

    def run(self, network: nn.Module, surrogate: nn.Module | None, shard: Shard) -> Arrays:  # noqa: ARG002 - protocol
        """Attack the images."""
        # The library's backward pass reaches every parameter that wants a gradient: a copy wants none.
        still = copy.deepcopy(network).requires_grad_(requires_grad=False)
        with evaluating(still), float32(shard.device):
            found = [
                minimum_norms(logits_of(still), batch.images, batch.labels, self.norm, steps=self.steps)
                for batch in shard.batches(self.batch_size)
            ]
        return {"norms": torch.cat(found).cpu().numpy()}

    def merge(self, parts: Sequence[Arrays]) -> npt.NDArray[np.float64]:
        """All images' norms."""
        return np.concatenate([part["norms"] for part in parts]).astype(np.float64)


@dataclass(frozen=True)
class SurrogateMeasurement:
    """Trains a surrogate on the shard's images; one shard, merged to the surrogate."""

    norm: Norm
    epsilon: float
    num_classes: int
    seed: int

    def run(self, network: nn.Module, surrogate: nn.Module | None, shard: Shard) -> Arrays:  # noqa: ARG002 - protocol
        """Train it."""
        found = train_surrogate(
            shard.images,
            shard.labels,
            self.num_classes,
            self.norm,
            self.epsilon,
            seed=self.seed,
            device=shard.device,
        )
        weights = {f"weights/{name}": value.numpy() for name, value in found.weights.items()}
        return {"facts": np.array(json.dumps(vars(found.facts))), **weights}

    def merge(self, parts: Sequence[Arrays]) -> TrainedSurrogate:
        """The surrogate."""
        (only,) = parts
        weights = {
            name.removeprefix("weights/"): torch.from_numpy(value)
            for name, value in only.items()
            if name.startswith("weights/")
        }
        return TrainedSurrogate(weights, SurrogateFacts(**json.loads(str(only["facts"]))))


@dataclass(frozen=True)
class AuditMeasurement:
    """The audit; one shard, merged to an Audit."""

    attack: Attack
    seed: int
    batch_size: int
    no_surrogate: str = ""

    def run(self, network: nn.Module, surrogate: nn.Module | None, shard: Shard) -> Arrays:
        """Run every check."""
        found = audit(
            network,
            shard.images,
            shard.labels,
            self.attack,
            surrogate=surrogate,
            no_surrogate=self.no_surrogate,
            seed=self.seed,
            batch_size=self.batch_size,
            device=shard.device,
        )
        return {"audit": np.array(json.dumps(asdict(found)))}

    def merge(self, parts: Sequence[Arrays]) -> Audit:
        """The audit."""
        (only,) = parts
        found = json.loads(str(only["audit"]))
        return Audit.of([Check(**check) for check in found["checks"]], found["images"])


@dataclass(frozen=True)
class Task:
    """A measurement of one model on some images.

    Attributes:
        name: What is measured.
        model: First digits of the weights' SHA-256: a file of another model cannot be taken for this one's.
        split: Where the images are.
        rows: Which images.
        shard_size: Images a shard.
        measurement: What is done with them.
    """

    name: str
    model: str
    split: Literal["train", "test"]
    rows: Rows = field(repr=False)
    shard_size: int
    measurement: Measurement

    @property
    def key(self) -> tuple[str, str]:
        """Model and name, by which the result is found."""
        return self.model, self.name

    def shards(self) -> Iterator[tuple[str, Rows]]:
        """Each shard's file, relative to the folder of shards, and its rows."""
        for start in range(0, len(self.rows), self.shard_size):
            rows = self.rows[start : start + self.shard_size]
            # The rows are in the name: what is known of the training run, which decides on them, differs by address.
            yield f"{self.model}/{self.name}-{start:07d}-{crc32(rows.tobytes()):08x}.npz", rows


def select(
    results: Mapping[tuple[str, str], Any], tasks: Sequence[Task], chosen: BoolArray
) -> dict[tuple[str, str], Any]:
    """Results with those of the chosen test images alone.

    Args:
        results: Merged results of the tasks, by their keys.
        tasks: What was measured.
        chosen: Which test images (N,), of the whole set.

    Returns:
        The same results; what is of training images, and the audit, which has no result by image, as it was.
    """
    selected = dict(results)
    for task in tasks:
        found = results[task.key]
        if task.split == "train":
            continue
        if isinstance(found, ShardOutcome | EmbeddedImages):
            selected[task.key] = found.only(chosen[task.rows])
        elif isinstance(found, np.ndarray):
            selected[task.key] = found[chosen[task.rows]]
    return selected


class MissingShard(NamedTuple):
    """A shard to measure.

    Attributes:
        task: What it belongs to.
        name: File of its result, relative to the folder of shards.
        rows: Its images.
    """

    task: Task
    name: str
    rows: Rows


class Measurer(Protocol):
    """Where shards are measured; its string says on what hardware."""

    def __call__(
        self,
        shards: Sequence[MissingShard],
        networks: Mapping[str, nn.Module],
        surrogate: nn.Module | None,
        dataset: Dataset,
    ) -> Iterator[tuple[MissingShard, Arrays]]:
        """Yield each shard with its result, in any order.

        Args:
            shards: What to measure.
            networks: By the tasks' `model`; on the CPU, in eval mode.
            surrogate: For transfer attacks.
            dataset: Where the images are.
        """


class MeasureHere:
    """Measures in this process, on its GPU if there is one."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __str__(self) -> str:
        return hardware(self.device)

    def __call__(
        self,
        shards: Sequence[MissingShard],
        networks: Mapping[str, nn.Module],
        surrogate: nn.Module | None,
        dataset: Dataset,
    ) -> Iterator[tuple[MissingShard, Arrays]]:
        """See :class:`Measurer`."""
        for network in (*networks.values(), *([surrogate] if surrogate is not None else [])):
            network.to(self.device)
        for shard in shards:
            images, labels = shard_images(shard, dataset)
            network = networks[shard.task.model]
            yield (
                shard,
                shard.task.measurement.run(network, surrogate, Shard(images, labels, shard.rows, self.device)),
            )


def shard_images(shard: MissingShard, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W), uint8, and labels (n,) of a shard."""
    source, rows = dataset.train if shard.task.split == "train" else dataset.test, torch.from_numpy(shard.rows)
    return source.fetch(rows), source.labels[rows]


def run_tasks(
    tasks: Sequence[Task],
    networks: Mapping[str, nn.Module],
    surrogate: nn.Module | None,
    dataset: Dataset,
    folder: Path,
    measure: Measurer,
    say: Callable[[str], None],
) -> dict[tuple[str, str], Any]:
    """Measure, shard by shard. Shards are saved as they come in; one that was saved before is not measured again.

    Args:
        tasks: What to measure.
        networks: By the tasks' `model`.
        surrogate: For transfer attacks.
        dataset: Where the images are.
        folder: Shards are kept under ``shards/`` in it.
        measure: Measures those that are not there.
        say: Told of progress.

    Returns:
        Merged results by (model, task name).

    Raises:
        UserError: A network or a data set does not fit, or a shard cannot be measured.
    """
    shards = [MissingShard(task, name, rows) for task in tasks for name, rows in task.shards()]
    missing = [shard for shard in shards if not _is_saved(folder / "shards" / shard.name)]
    if missing:
        done = len(shards) - len(missing)
        say(f"{len(missing)} shards to measure" + (f", {done} taken from before" if done else ""))
        for count, (shard, arrays) in enumerate(measure(missing, networks, surrogate, dataset), start=1):
            save_arrays(arrays, folder / "shards" / shard.name)
            say(f"{count}/{len(missing)}  {shard.task.name}")
    return {
        task.key: task.measurement.merge([load_arrays(folder / "shards" / name) for name, _ in task.shards()])
        for task in tasks
    }


def _is_saved(path: Path) -> bool:
    """Whether a shard has a file that can be read; a damaged one is measured again."""
    try:
        load_arrays(path)
    except UnavailableError:
        return False
    return True
