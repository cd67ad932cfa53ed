"""Where a network puts images: embeddings and logits of clean and of attacked images, in float32."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import nn

from tla_service.attacks import Attack, attack_images, craft
from tla_service.data import Batch
from tla_service.errors import ConfigError
from tla_service.evaluation.results import BoolArray
from tla_service.evaluation.shards import Arrays, IntArray, Shard, evaluating, float32, frozen, joined_arrays, logits_of
from tla_service.inference.detector import Floats, Integers, Scores
from tla_service.runtime import generator, mixed_seed

_REMEDY = "evaluate another checkpoint, or, if it is so under attack alone, no embeddings: images.representation=0"


@dataclass(frozen=True)
class Embedded:
    """Images as a network sees them: embeddings (N, D) and logits (N, K), float32, and true classes (N,), int64.

    Embeddings are penultimate activations. ConfigError if a value is not finite: no measure would mean anything.
    """

    embeddings: Floats
    logits: Floats
    labels: Integers

    def __post_init__(self) -> None:
        finite = np.isfinite(self.embeddings).all(axis=1), np.isfinite(self.logits).all(axis=1)
        broken: BoolArray = ~np.logical_and(*finite)
        if broken.any():
            reason = f"gives embeddings or logits that are not finite for {broken.sum()} of {len(broken)} images"
            raise ConfigError("model", None, reason, _REMEDY)

    def __len__(self) -> int:
        """Number of images, N."""
        return len(self.labels)

    @property
    def predictions(self) -> Integers:
        """Predicted classes (N,), int64; the lowest class of equals."""
        return self.logits.argmax(1).astype(np.int64)

    @property
    def correct(self) -> BoolArray:
        """Whether each image is classified correctly (N,)."""
        return self.predictions == self.labels

    @property
    def max_softmax(self) -> Scores:
        """The largest class probability of each image (N,), in [1/K, 1]."""
        shifted = self.logits.astype(np.float64) - self.logits.max(1, keepdims=True)
        return 1 / np.exp(shifted).sum(1)

    def subset(self, indices: Integers | BoolArray) -> Self:
        """The rows at `indices` (n,), in that order, or those that are chosen (N,)."""
        return type(self)(self.embeddings[indices], self.logits[indices], self.labels[indices])

    @classmethod
    def joined(cls, *parts: Self) -> Self:
        """All rows of all parts, part after part."""
        return cls(**joined_arrays([vars(part) for part in parts]))


def embed(network: nn.Module, batches: Iterable[Batch]) -> Embedded:
    """Embed images as they are, in the order given, with the bare network in eval mode and float32.

    Memory holds one batch and the (N, D + K) result, never the images. ConfigError if a value is not finite.
    """
    parts = []
    with torch.no_grad(), evaluating(network), float32(_device(network)):
        for batch in batches:
            output = network(batch.images)
            embeddings, logits = (tensor.float().cpu().numpy() for tensor in (output.embeddings, output.logits))
            parts.append(Embedded(embeddings, logits, batch.labels.cpu().numpy()))
    return Embedded.joined(*parts)


def attacked(network: nn.Module, batches: Sequence[Batch], attack: Attack, seed: int) -> list[Batch]:
    """Attack images, in the order given, with the bare network in eval mode and float32.

    Images that are misclassified when clean are attacked once: a shift or a score measured on them would otherwise be
    that of clean images. Among restarts, an image keeps its worst. The seed fixes the random starts, together with the
    division into batches.
    """
    made, logits_fn = [], logits_of(network)
    with evaluating(network), float32(_device(network)):
        crafted_on = logits_of(frozen(network, batches[0].images))
        for index, batch in enumerate(batches):
            random = generator(batch.images.device, seed, index)
            images, broken_at = attack_images(logits_fn, batch.images, batch.labels, attack, random, crafted_on)
            wrong = (broken_at == 0).nonzero().squeeze(1)
            if len(wrong):
                shown, labels = batch.images[wrong], batch.labels[wrong]
                images[wrong] = craft(crafted_on, shown, labels, attack, random, skip_repeats=True)
            made.append(Batch(images, batch.labels))
    return made


def _device(network: nn.Module) -> torch.device:
    """Where the network is; one without parameters counts as on the CPU."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class EmbeddedImages:
    """Embedded images, their numbers in their set (N,), and the pixels (n, C, H, W) in [0, 1] of the first n."""

    embedded: Embedded
    rows: IntArray
    pixels: Floats

    def only(self, chosen: BoolArray) -> Self:
        """The images that are chosen (N,)."""
        pixels = self.pixels[chosen[: len(self.pixels)]]
        return replace(self, embedded=self.embedded.subset(chosen), rows=self.rows[chosen], pixels=pixels)


@dataclass(frozen=True)
class EmbeddingMeasurement:
    """Embeddings and logits of images, natural or attacked; merged to EmbeddedImages."""

    attack: Attack | None
    seed: int
    batch_size: int
    keep_images: bool = False

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        batches = list(shard.batches(self.batch_size))
        if self.attack is not None:
            batches = attacked(shard.network, batches, self.attack, mixed_seed(self.seed, int(shard.rows[0])))
        kept = torch.cat([batch.images for batch in batches]) if self.keep_images else shard.images[:0].float()
        return {**vars(embed(shard.network, batches)), "rows": shard.rows, "pixels": kept.cpu().numpy()}

    def merge(self, parts: Sequence[Arrays]) -> EmbeddedImages:
        """See `Measurement`."""
        arrays = joined_arrays(parts)
        rows, pixels = arrays.pop("rows"), arrays.pop("pixels")
        return EmbeddedImages(Embedded(**arrays), rows, pixels)
