"""Batches on the device, in an order that can be resumed at any step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch

from tla_service.config import DataConfig
from tla_service.data.augmentation import augment, to_unit
from tla_service.data.encoded import RESIDENT_BYTES
from tla_service.data.order import Draw, StepIndices, StepOrder
from tla_service.data.sources import ArraySource, ImageSource
from tla_service.data.streaming import StepLoader
from tla_service.runtime import WorkerContext, generator

_READ_AT_ONCE = 1024
# Of anchors, positives and pool.
_DRAWS = (Draw.AUGMENT_ANCHORS, Draw.AUGMENT_POSITIVES, Draw.AUGMENT_POOL)


@dataclass(frozen=True)
class Batch:
    """Images (N, C, H, W), float32 in [0, 1], and their classes (N,), int64, on the device."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.labels.numel()


@dataclass(frozen=True)
class StepBatch:
    """What one worker needs for one step.

    Attributes:
        anchors: Images to attack.
        positives: Another image of each anchor's class, row by row; the anchor's own image with another augmentation
            where its class has only one. ``None`` if not requested.
        pool: Images to mine negatives from. ``None`` if not requested.
        global_size: Anchors of this step over all workers; the workers' shares differ by one at most.
    """

    anchors: Batch
    positives: Batch | None
    pool: Batch | None
    global_size: int


@dataclass(frozen=True)
class RawBatch:
    """A step's images before augmentation.

    Attributes:
        epoch: Epoch of the step, from 0.
        step: Step of the epoch, from 0.
        roles: Images (N, C, H, W), uint8, and labels (N,) of anchors, positives and pool, on the device, or ``None``.
        global_size: See `StepBatch`.
    """

    epoch: int
    step: int
    roles: tuple[tuple[torch.Tensor, torch.Tensor] | None, ...]
    global_size: int


class TrainingBatches:
    """Training batches of one worker; `steps_per_epoch` is ceil(N / global_batch_size).

    Everything is a function of (seed, epoch, step, rank, world size), so a run can resume at any step. Images are kept
    on the device as uint8, or read by loader processes; on the CPU both give identical batches.

    Args:
        source: Images.
        indices: Which of them to train on (N,), int64, each once.
        order: Positions in `indices` that each step uses.
        config: Augmentation, residency, loaders.
        context: This worker.
        augment_pool: Whether the pool is augmented.

    Attributes:
        steps_per_epoch: Steps per epoch.
        sizes: Sizes of this worker's batches of anchors; two at most.

    Iterating raises UnavailableError if images cannot be read.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: torch.Tensor,
        order: StepOrder,
        config: DataConfig,
        context: WorkerContext,
        *,
        augment_pool: bool = True,
    ) -> None:
        self._source, self._indices, self._order = source, indices, order
        self._config, self._context, self._augment_pool = config, context, augment_pool
        self.steps_per_epoch, self.sizes = order.steps_per_epoch, order.sizes
        self._labels = source.labels[indices].to(context.device)
        self._loader: StepLoader | None = None
        if not _fits(source, config):
            self._loader = StepLoader(source, indices, config.loader_workers, context.device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """Batches of an epoch (from 0), one per step, from ``start_step`` on; one epoch at a time."""
        for raw in self.read(epoch, start_step):
            yield self.augmented(raw)

    def read(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """As `epoch`, before augmentation."""
        steps = self._order.epoch(epoch, start_step)
        read = ((indices, None) for indices in steps) if self._loader is None else self._loader.read(steps)
        for step, (indices, images) in enumerate(read, start=start_step):
            yield self._raw(epoch, step, indices, images)

    def augmented(self, raw: RawBatch) -> StepBatch:
        """The batch of a step, the same one every time."""
        batches = [
            None if role is None else Batch(self._finished(role[0], draw, raw), role[1])
            for draw, role in zip(_DRAWS, raw.roles, strict=True)
        ]
        assert batches[0] is not None
        return StepBatch(batches[0], batches[1], batches[2], raw.global_size)

    def close(self) -> None:
        """Stop the loader processes, if any. The object cannot be used afterwards."""
        if self._loader is not None:
            self._loader.close()

    @cached_property
    def _resident(self) -> torch.Tensor:
        """All training images on the device, as uint8; copied when the first epoch begins."""
        return _all_images(self._source, self._indices).to(self._context.device)

    def _raw(self, epoch: int, step: int, indices: StepIndices, images: torch.Tensor | None) -> RawBatch:
        roles: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        start = 0
        for places in (indices.anchors, indices.positives, indices.pool):
            if places is None:
                roles.append(None)
                continue
            on_device = _moved(places, self._context.device)
            if images is None:
                pixels = self._resident[on_device]
            else:
                pixels = images[start : start + len(places)].to(self._context.device, non_blocking=True)
                start += len(places)
            roles.append((pixels, self._labels[on_device]))
        return RawBatch(epoch, step, tuple(roles), indices.global_size)

    def _finished(self, pixels: torch.Tensor, draw: Draw, raw: RawBatch) -> torch.Tensor:
        if draw is Draw.AUGMENT_POOL and not self._augment_pool:
            return to_unit(pixels)
        draws = generator(self._context.device, draw, self._order.seed, raw.epoch, raw.step, self._context.rank)
        return augment(pixels, self._config, draws)


class EvaluationBatches:
    """Images of one worker in order, without augmentation; can be iterated repeatedly.

    Rank r of W gets ``indices[r::W]``: every image is in exactly one worker's batches, without padding.

    The last batch may be smaller. Iterating raises UnavailableError if images cannot be read.
    """

    def __init__(self, source: ImageSource, indices: torch.Tensor, context: WorkerContext, *, batch_size: int) -> None:
        self._source, self._device = source, context.device
        own = indices[context.rank :: context.world_size]
        self._chunks = torch.split(own, batch_size) if len(own) else ()

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; the next one is read while the current one is in use."""
        if not self._chunks:
            return
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._source.fetch, self._chunks[0])
            for chunk, following in zip_longest(self._chunks, self._chunks[1:]):
                images = coming.result()
                if following is not None:
                    coming = reader.submit(self._source.fetch, following)
                yield Batch(to_unit(_moved(images, self._device)), _moved(self._source.labels[chunk], self._device))


def _fits(source: ImageSource, config: DataConfig) -> bool:
    """Whether the images are to be kept on the device."""
    if config.residency != "auto":
        return config.residency == "device"
    return isinstance(source, ArraySource) and source.images.numel() < RESIDENT_BYTES


def _all_images(source: ImageSource, indices: torch.Tensor) -> torch.Tensor:
    if isinstance(source, ArraySource):
        whole = len(indices) == len(source) and torch.equal(indices, torch.arange(len(source)))
        return source.images if whole else source.images[indices]
    return torch.cat([source.fetch(chunk) for chunk in torch.split(indices, _READ_AT_ONCE)])


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting: from pinned memory, a copy overlaps with computation."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
