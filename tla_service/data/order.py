"""Which images a step uses: a function of seed, epoch, step, rank and world size alone, never of earlier draws."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch

from tla_service.errors import ConfigError
from tla_service.runtime import generator

CPU = torch.device("cpu")


class Draw(IntEnum):
    """Purpose of a random draw; the first part of its seed, so that no two purposes share numbers."""

    ORDER = 0xDA7A01
    POOL_ORDER = 0xDA7A02
    POSITIVES = 0xDA7A03
    AUGMENT_ANCHORS = 0xDA7A04
    AUGMENT_POSITIVES = 0xDA7A05
    AUGMENT_POOL = 0xDA7A06
    EXTRA_ORDER = 0xDA7A07
    AUGMENT_VIEW = 0xDA7A11


@dataclass(frozen=True)
class StepIndices:
    """One worker's images of one step, as positions in the training set, int64; roles as in `StepBatch`.

    Beyond the training set, of N images, N + j is extra image j.
    """

    anchors: torch.Tensor
    positives: torch.Tensor | None
    pool: torch.Tensor | None
    global_size: int

    @property
    def roles(self) -> tuple[torch.Tensor | None, ...]:
        """Anchors, positives and pool."""
        return self.anchors, self.positives, self.pool

    @property
    def all(self) -> torch.Tensor:
        """All positions, in the order of the roles."""
        return torch.cat([role for role in self.roles if role is not None])


def class_weights(labels: torch.Tensor) -> torch.Tensor:
    """N / (K n_k) for each class k of images ``labels`` (N,), int64: (classes,), float32; 0 for absent classes.

    K classes have images. Scikit-learn's ``class_weight="balanced"``: the mean over the images is 1.
    """
    counts = labels.bincount()
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0).float()


class ClassMates:
    """Draws another image of the same class; ``labels`` are the classes of all images (N,), int64."""

    def __init__(self, labels: torch.Tensor) -> None:
        self._by_class = labels.argsort(stable=True)
        counts = labels.bincount()
        starts = counts.cumsum(0) - counts
        self._first, self._count = starts[labels], counts[labels]
        self._place = self._by_class.argsort() - self._first

    def draw(self, anchors: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """Another image of each anchor's class, uniformly, or itself if alone; positions (n,), int64, on the CPU."""
        others = self._count[anchors] - 1
        # Float64 keeps the product below `others`, and the draw uniform to one part in 10^10 even for huge classes.
        pick = (torch.rand(len(anchors), generator=draws, dtype=torch.float64) * others).to(torch.int64)
        own = self._place[anchors]
        pick = torch.where(others > 0, pick + (pick >= own), own)
        return self._by_class[self._first[anchors] + pick]


def shard_sizes(total: int, world_size: int, extra: int = 0) -> list[int]:
    """Images of each worker in a step of `total` images, of which `extra` are extra ones, as `StepOrder` deals them."""
    ranks, own = range(world_size), total - extra
    return [len(range(rank, own, world_size)) + len(range(ranks[-1 - rank], extra, world_size)) for rank in ranks]


class StepOrder:
    """The steps of every epoch, as one worker sees them.

    An epoch's permutation is the same on all ranks. It is cut into ``steps_per_epoch`` chunks and each chunk into a
    shard for every rank, with sizes that differ by at most one: every image is used once per epoch, without padding or
    dropping, and the images of a step do not depend on the number of workers.

    With ``balanced``, anchors are N draws with replacement instead, from each class with the same probability.

    Each step has ``extra_per_step`` of ``extra`` more images besides, by permutations of their own, one after another
    over all epochs: each is used once before any is used again.

    ``labels`` are the classes (N,), int64; ``pool_size`` images, all different, are a worker's mining pool of a step.
    ConfigError if the pools of a step need more images than there are, or a worker would get none in some step.
    """

    def __init__(
        self,
        labels: torch.Tensor,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        global_batch_size: int,
        pool_size: int = 0,
        same_class_positives: bool = False,
        balanced: bool = False,
        extra: int = 0,
        extra_per_step: int = 0,
    ) -> None:
        self._extra, self._extra_per_step = extra, extra_per_step
        self._count, self.seed, self._rank, self._world_size = len(labels), seed, rank, world_size
        self._pool_size = pool_size
        self._mates = ClassMates(labels) if same_class_positives else None
        self._odds = class_weights(labels)[labels] if balanced else None
        if pool_size * world_size > self._count:
            reason = f"{world_size} workers' pools of {pool_size} need more than the {self._count} training images"
            remedy = f"use at most {self._count // world_size} per worker"
            raise ConfigError("mining.pool_size", pool_size, reason, remedy)
        self.steps_per_epoch = steps = -(-self._count // global_batch_size)
        if self._count == 0 or self._count // steps + extra_per_step < world_size:
            reason = f"{self._count} training images in {steps} steps are too few for {world_size} workers"
            remedy = "use a larger batch, fewer workers or more images"
            raise ConfigError("training.global_batch_size", global_batch_size + extra_per_step, reason, remedy)

    @property
    def sizes(self) -> set[int]:
        """Sizes of this worker's batches: two at most."""
        steps = torch.arange(self._count).tensor_split(self.steps_per_epoch)
        extra = len(self._extra_share(torch.arange(self._extra_per_step)))
        return {len(steps[step].tensor_split(self._world_size)[self._rank]) + extra for step in (0, -1)}

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepIndices]:
        """The steps of an epoch (from 0), from ``start_step`` in [0, steps_per_epoch] on."""
        chunks = self._anchors(epoch).tensor_split(self.steps_per_epoch)
        pool_order = self._permutation(Draw.POOL_ORDER, epoch) if self._pool_size else None
        extra = self._extra_order(epoch) + self._count if self._extra_per_step else torch.empty(0, dtype=torch.int64)
        extra_chunks = extra.tensor_split(self.steps_per_epoch)
        for step in range(start_step, self.steps_per_epoch):
            anchors = chunks[step].tensor_split(self._world_size)[self._rank]
            positives = pool = None
            if self._mates is not None:
                draws = generator(CPU, Draw.POSITIVES, self.seed, epoch, step, self._rank)
                positives = self._mates.draw(anchors, draws)
            if pool_order is not None:
                start = (step * self._world_size + self._rank) * self._pool_size
                pool = pool_order[torch.arange(start, start + self._pool_size) % self._count]
            anchors = torch.cat([anchors, self._extra_share(extra_chunks[step])])
            yield StepIndices(anchors, positives, pool, len(chunks[step]) + self._extra_per_step)

    def _extra_share(self, extra: torch.Tensor) -> torch.Tensor:
        """This worker's part of a step's; the last ranks get the larger parts, as the first do of training images."""
        return extra.tensor_split(self._world_size)[self._world_size - 1 - self._rank]

    def _extra_order(self, epoch: int) -> torch.Tensor:
        wanted = self.steps_per_epoch * self._extra_per_step
        first, skipped = divmod(epoch * wanted, self._extra)
        draws = (self._draws(Draw.EXTRA_ORDER, first + n) for n in range(-(-(skipped + wanted) // self._extra)))
        return torch.cat([torch.randperm(self._extra, generator=each) for each in draws])[skipped : skipped + wanted]

    def _anchors(self, epoch: int) -> torch.Tensor:
        if self._odds is None:
            return self._permutation(Draw.ORDER, epoch)
        # By inversion: torch.multinomial takes at most 2^24 images.
        ends = self._odds.double().cumsum(0)
        draws = torch.rand(self._count, generator=self._draws(Draw.ORDER, epoch), dtype=torch.float64)
        return torch.searchsorted(ends, draws * ends[-1], right=True).clamp_(max=self._count - 1)

    def _permutation(self, draw: Draw, epoch: int) -> torch.Tensor:
        return torch.randperm(self._count, generator=self._draws(draw, epoch))

    def _draws(self, draw: Draw, epoch: int) -> torch.Generator:
        # With zeros for step and rank: seeds of different lengths may coincide.
        return generator(CPU, draw, self.seed, epoch, 0, 0)
