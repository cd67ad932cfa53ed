"""Reading the images of coming steps in loader processes."""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import data

from tla_service.data.decoding import usable_cores
from tla_service.data.order import StepIndices
from tla_service.data.sources import ImageSource
from tla_service.errors import UserError
from tla_service.files import check_socket_path


class StepLoader:
    """Reads steps ahead: one loader process reads all images of one step.

    Uses at most one process per core, or this one for 0 workers; reads into pinned memory for a GPU.
    """

    def __init__(self, source: ImageSource, indices: torch.Tensor, workers: int, device: torch.device) -> None:
        # torch warns of more processes than cores.
        workers = min(workers, usable_cores())
        if workers:
            # Loader processes hand their tensors over through sockets of multiprocessing.
            remedy = "set TMPDIR to a shorter folder, or data.loader_workers to 0"
            socket = "pymp-00000000/listener-00000000"
            check_socket_path("TMPDIR", tempfile.gettempdir(), socket, "loader processes", remedy)
        self._steps = _StepSampler(indices)
        self._loader: data.DataLoader[torch.Tensor | UserError] | None = data.DataLoader(
            _StepImages(source),
            batch_sampler=self._steps,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            # Its own: otherwise every epoch would draw from the global generator and change what others draw.
            generator=torch.Generator(),
        )

    def read(self, steps: Iterator[StepIndices]) -> Iterator[tuple[StepIndices, torch.Tensor]]:
        """Read the images (n, C, H, W), uint8, of each step: anchors, then positives, then pool.

        ``steps`` is consumed ahead of what is yielded.

        Raises:
            UserError: If images cannot be read.
        """
        assert self._loader is not None, "closed"
        self._steps.begin(steps)
        for images in self._loader:
            if isinstance(images, UserError):
                raise images
            yield self._steps.handed_out.pop(0), images

    def close(self) -> None:
        """Stop the loader processes."""
        # Releasing the loader's iterator stops its persistent workers.
        self._loader = None


class _StepSampler(data.Sampler[list[int]]):
    """Hands the steps' images to the loader, and remembers the steps until their images arrive."""

    def __init__(self, indices: torch.Tensor) -> None:
        self._indices = indices
        self._steps: Iterator[StepIndices] = iter(())
        self.handed_out: list[StepIndices] = []

    def begin(self, steps: Iterator[StepIndices]) -> None:
        self._steps, self.handed_out = steps, []

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            self.handed_out.append(step)
            parts = [part for part in (step.anchors, step.positives, step.pool) if part is not None]
            # A list: a tensor would be put in shared memory, with one file descriptor per step.
            yield self._indices[torch.cat(parts)].tolist()


class _StepImages(data.Dataset[torch.Tensor]):
    """What runs in the loader processes."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._source.fetch(torch.tensor([index]))

    def __getitems__(self, indices: list[int]) -> torch.Tensor | UserError:
        try:
            return self._source.fetch(torch.tensor(indices))
        except UserError as error:
            # Returned, not raised: the loader would rebuild it from its text alone, as another error.
            return error


def _as_it_is(images: Any) -> Any:
    return images
