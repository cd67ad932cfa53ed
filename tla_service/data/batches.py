"""Batches on the device, in an order that can be resumed at any step."""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import tee, zip_longest

import torch
from torch.utils import data

from tla_service.config import DataConfig
from tla_service.data.augmentation import augment, to_unit
from tla_service.data.decoding import usable_cores
from tla_service.data.order import Draw, StepIndices, StepOrder, class_weights
from tla_service.data.sources import RESIDENT_BYTES, ArraySource, ImageSource, JoinedSource
from tla_service.errors import UserError
from tla_service.files import check_socket_path
from tla_service.runtime import WorkerContext, generator

_Source = ImageSource | JoinedSource
# Of anchors, positives, pool and the second view.
_DRAWS = (Draw.AUGMENT_ANCHORS, Draw.AUGMENT_POSITIVES, Draw.AUGMENT_POOL, Draw.AUGMENT_VIEW)


@dataclass(frozen=True)
class Batch:
    """Images (N, C, H, W), float32 in [0, 1], and their classes (N,), int64, or shares of classes (N, K), float32."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class StepBatch:
    """What one worker needs for one step.

    Attributes:
        anchors: Images to attack.
        positives: Another image of each anchor's class, row by row; the anchor's own image with another augmentation
            where its class has only one. ``None`` if not requested.
        pool: Images to mine negatives from. ``None`` if not requested.
        global_size: Anchors of this step over all workers; the workers' shares differ by one at most.
        weights: Class weight of each anchor (N,), float32, mean 1 over the training set. ``None``: all 1.
        view: The anchors again with strong augmentation, which they then lack. ``None`` if not requested.
    """

    anchors: Batch
    positives: Batch | None
    pool: Batch | None
    global_size: int
    weights: torch.Tensor | None = None
    view: Batch | None = None


class TrainingBatches:
    """Training batches of one worker; `steps_per_epoch` is ceil(N / global_batch_size).

    Everything is a function of (seed, epoch, step, rank, world size), so a run can resume at any step. Images are kept
    on the device as uint8, or read by loader processes; on the CPU both give identical batches.

    ``indices`` (N,), int64, are the images of ``source`` to train on, each once; ``order`` holds positions in them.
    ``sizes`` are those of this worker's batches of anchors. Iterating raises UnavailableError if images cannot be read.
    """

    def __init__(
        self,
        source: _Source,
        indices: torch.Tensor,
        order: StepOrder,
        config: DataConfig,
        context: WorkerContext,
        *,
        augment_pool: bool = True,
        second_view: bool = False,
    ) -> None:
        self._second_view = second_view
        self._source, self._indices, self._order = source, indices, order
        self._config, self._context, self._augment_pool = config, context, augment_pool
        self.steps_per_epoch, self.sizes = order.steps_per_epoch, order.sizes
        labels = source.labels[indices]
        self._labels = labels.to(context.device)
        weighted = config.balance == "class_weights"
        self._class_weights = class_weights(labels).to(context.device) if weighted else None
        parts = source.parts if isinstance(source, JoinedSource) else (source,)
        arrays = [part.images.numel() for part in parts if isinstance(part, ArraySource)]
        fits = len(arrays) == len(parts) and sum(arrays) < RESIDENT_BYTES
        resident = fits if config.residency == "auto" else config.residency == "device"
        self._loader = None if resident else _StepLoader(source, indices, config.loader_workers, context.device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """Batches of an epoch (from 0), one per step, from ``start_step`` on; one epoch at a time."""
        device = self._context.device
        steps = self._order.epoch(epoch, start_step)
        read = ((indices, None) for indices in steps) if self._loader is None else self._loader.read(steps)
        for step, (indices, images) in enumerate(read, start=start_step):
            places = _moved(indices.all, device)
            pixels = self._resident[places] if images is None else images.to(device, non_blocking=True)
            sizes = [0 if role is None else len(role) for role in indices.roles]
            parts = zip(pixels.split(sizes), self._labels[places].split(sizes), strict=True)
            roles = [None if role is None else part for role, part in zip(indices.roles, parts, strict=True)]
            roles.append(roles[0] if self._second_view else None)
            anchors, positives, pool, view = (
                None if role is None else Batch(self._finished(role[0], draw, epoch, step), role[1])
                for draw, role in zip(_DRAWS, roles, strict=True)
            )
            assert anchors is not None
            weights = None if self._class_weights is None else self._class_weights[anchors.labels]
            yield StepBatch(anchors, positives, pool, indices.global_size, weights, view)

    def close(self) -> None:
        """Stop the loader processes, if any. The object cannot be used afterwards."""
        del self._loader  # releasing its iterator stops its persistent workers

    @cached_property
    def _resident(self) -> torch.Tensor:
        """All training images on the device, as uint8; copied when the first epoch begins."""
        return self._source.fetch(self._indices).to(self._context.device)

    def _finished(self, pixels: torch.Tensor, draw: Draw, epoch: int, step: int) -> torch.Tensor:
        if draw is Draw.AUGMENT_POOL and not self._augment_pool:
            return to_unit(pixels)
        draws = generator(self._context.device, draw, self._order.seed, epoch, step, self._context.rank)
        return augment(pixels, self._config, draws, strongly=draw is Draw.AUGMENT_VIEW or not self._second_view)


class EvaluationBatches:
    """Images of one worker in order, without augmentation; can be iterated repeatedly.

    Rank r of W gets ``indices[r::W]``: every image is in one worker's batches, of which the last may be smaller.
    """

    def __init__(self, source: ImageSource, indices: torch.Tensor, context: WorkerContext, *, batch_size: int) -> None:
        self._source, self._device = source, context.device
        own = indices[context.rank :: context.world_size]
        self._chunks = torch.split(own, batch_size) if len(own) else ()

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


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting: from pinned memory, a copy overlaps with computation."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class _StepLoader:
    """Reads steps ahead, into pinned memory for a GPU: one loader process reads all images of one step."""

    def __init__(self, source: _Source, indices: torch.Tensor, workers: int, device: torch.device) -> None:
        # torch warns of more processes than cores.
        workers = min(workers, usable_cores())
        if workers:
            # Loader processes hand their tensors over through sockets of multiprocessing.
            remedy = "set TMPDIR to a shorter folder, or data.loader_workers to 0"
            socket = "pymp-00000000/listener-00000000"
            check_socket_path("TMPDIR", tempfile.gettempdir(), socket, "loader processes", remedy)
        self._sampler = _StepSampler(indices)
        self._loader: data.DataLoader[torch.Tensor | UserError] = data.DataLoader(
            _StepImages(source),
            batch_size=None,
            sampler=self._sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            # Its own: otherwise every epoch would draw from the global generator and change what others draw.
            generator=torch.Generator(),
        )

    def read(self, steps: Iterator[StepIndices]) -> Iterator[tuple[StepIndices, torch.Tensor]]:
        """Read the images (n, C, H, W), uint8, of each step; ``steps`` is consumed ahead of what is yielded."""
        self._sampler.steps, ours = tee(steps)
        for images, step in zip(self._loader, ours, strict=True):
            if isinstance(images, UserError):
                raise images
            yield step, images


class _StepSampler:
    """Hands the steps' images to the loader, which reads one epoch after another from it."""

    def __init__(self, indices: torch.Tensor) -> None:
        self._indices = indices
        self.steps: Iterator[StepIndices] = iter(())

    def __iter__(self) -> Iterator[list[int]]:
        # Lists: a tensor would be put in shared memory, with one file descriptor per step.
        return (self._indices[step.all].tolist() for step in self.steps)


class _StepImages(data.Dataset[torch.Tensor | UserError]):
    """What runs in the loader processes."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def __getitem__(self, indices: list[int]) -> torch.Tensor | UserError:
        try:
            return self._source.fetch(torch.tensor(indices))
        except UserError as error:
            # Returned, not raised: the loader would rebuild it from its text alone, as another error.
            return error
