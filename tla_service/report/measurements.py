"""What is measured of one shard of images, as a few arrays, and how the shards are put together."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tla_service.attacks import Attack
from tla_service.attacks.autoattack import AutoAttackNorm
from tla_service.attacks.minimum_norm import SparseNorm, minimum_norms
from tla_service.config.bounds import Norm
from tla_service.data import Batch
from tla_service.evaluation.audit import audit
from tla_service.evaluation.embedding import Embedded, embed, embed_attacked
from tla_service.evaluation.intervals import BoolArray
from tla_service.evaluation.mode import as_pixels, evaluating, float32, logits_of
from tla_service.evaluation.outcomes import Arrays, IntArray, ShardOutcome, merge_outcomes, outcome_arrays, outcome_from
from tla_service.evaluation.results import Audit, Check, SurrogateFacts
from tla_service.evaluation.suite import evaluate_shard
from tla_service.evaluation.surrogate import TrainedSurrogate, train_surrogate
from tla_service.inference.detector import Floats
from tla_service.runtime import mixed_seed


@dataclass(frozen=True)
class Shard:
    """The images of one shard, and the networks that it is measured on.

    Attributes:
        network: Under evaluation, on the device, in eval mode.
        surrogate: An independently trained one, if there is one.
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        rows: Number of each image in its set (N,).
        device: Where to compute.
    """

    network: nn.Module
    surrogate: nn.Module | None
    images: Tensor
    labels: Tensor
    rows: IntArray
    device: torch.device

    def batches(self, size: int) -> Iterator[Batch]:
        """The images as float32 in [0, 1] on the device."""
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            yield Batch(as_pixels(self.images[part], self.device), self.labels[part].to(self.device))


class Measurement(Protocol):
    """Something measured shard by shard."""

    def run(self, shard: Shard) -> Arrays:
        """Measure one shard, maybe in a worker."""

    def merge(self, parts: Sequence[Arrays]) -> Any:
        """Put the shards together, in their order."""


@dataclass(frozen=True)
class AttackMeasurement:
    """Per-image results of attacks; merged to a ShardOutcome."""

    attacks: Mapping[str, Attack]
    transfer: Mapping[str, Attack]
    autoattack: tuple[AutoAttackNorm, float] | None
    seed: int
    batch_size: int

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        outcome = evaluate_shard(
            shard.network,
            shard.images,
            shard.labels,
            self.attacks,
            indices=shard.rows.tolist(),
            transfer=self.transfer,
            surrogate=shard.surrogate,
            autoattack=self.autoattack,
            seed=self.seed,
            batch_size=self.batch_size,
            device=shard.device,
        )
        return outcome_arrays(outcome)

    def merge(self, parts: Sequence[Arrays]) -> ShardOutcome:
        """See `Measurement`."""
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
    rows: IntArray
    pixels: Floats

    def only(self, chosen: BoolArray) -> Self:
        """The images that are chosen (N,)."""
        where = chosen.nonzero()[0]
        pixels = self.pixels[chosen[: len(self.pixels)]]
        return replace(self, embedded=self.embedded.subset(where), rows=self.rows[where], pixels=pixels)


@dataclass(frozen=True)
class EmbeddingMeasurement:
    """Embeddings and logits of images, natural or attacked; merged to EmbeddedImages."""

    attack: Attack | None
    seed: int
    batch_size: int
    keep_images: int = 0

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        batches = shard.batches(self.batch_size)
        kept: Floats | None = None
        if self.attack is None:
            found = embed(shard.network, batches)
        else:
            seed = mixed_seed(self.seed, int(shard.rows[0]))
            found, kept = embed_attacked(shard.network, batches, self.attack, seed, keep_images=self.keep_images)
        pixels = np.empty((0, *shard.images.shape[1:]), np.float32) if kept is None else kept
        return {**vars(found), "rows": shard.rows, "pixels": pixels}

    def merge(self, parts: Sequence[Arrays]) -> EmbeddedImages:
        """See `Measurement`."""
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        embedded = Embedded(joined["embeddings"], joined["logits"], joined["labels"])
        return EmbeddedImages(embedded, joined["rows"], joined["pixels"])


@dataclass(frozen=True)
class NormMeasurement:
    """The smallest perturbation found for each image; merged to norms (N,): 0 where wrong when clean, else infinite."""

    norm: SparseNorm
    batch_size: int

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        # The library's backward pass reaches every parameter that wants a gradient: a copy wants none.
        still = copy.deepcopy(shard.network).requires_grad_(requires_grad=False)
        with evaluating(still), float32(shard.device):
            found = [
                minimum_norms(logits_of(still), batch.images, batch.labels, self.norm)
                for batch in shard.batches(self.batch_size)
            ]
        return {"norms": torch.cat(found).cpu().numpy()}

    def merge(self, parts: Sequence[Arrays]) -> npt.NDArray[np.float64]:
        """See `Measurement`."""
        return np.concatenate([part["norms"] for part in parts]).astype(np.float64)


@dataclass(frozen=True)
class SurrogateMeasurement:
    """Trains a surrogate on the shard's images; one shard, merged to the surrogate."""

    norm: Norm
    epsilon: float
    num_classes: int
    seed: int

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        found = train_surrogate(
            shard.images, shard.labels, self.num_classes, self.norm, self.epsilon, seed=self.seed, device=shard.device
        )
        weights = {f"weights/{name}": value.numpy() for name, value in found.weights.items()}
        return {"facts": np.array(json.dumps(asdict(found.facts))), **weights}

    def merge(self, parts: Sequence[Arrays]) -> TrainedSurrogate:
        """See `Measurement`."""
        (only,) = parts
        names = [name for name in only if name.startswith("weights/")]
        weights = {name.removeprefix("weights/"): torch.from_numpy(only[name]) for name in names}
        return TrainedSurrogate(weights, SurrogateFacts(**json.loads(str(only["facts"]))))


@dataclass(frozen=True)
class AuditMeasurement:
    """The audit; one shard, merged to an Audit."""

    attack: Attack
    seed: int
    batch_size: int
    no_surrogate: str = ""

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        found = audit(
            shard.network,
            shard.images,
            shard.labels,
            self.attack,
            surrogate=shard.surrogate,
            no_surrogate=self.no_surrogate,
            seed=self.seed,
            batch_size=self.batch_size,
            device=shard.device,
        )
        return {"audit": np.array(json.dumps(asdict(found)))}

    def merge(self, parts: Sequence[Arrays]) -> Audit:
        """See `Measurement`."""
        (only,) = parts
        found = json.loads(str(only["audit"]))
        return Audit.of([Check(**check) for check in found["checks"]], found["images"])
