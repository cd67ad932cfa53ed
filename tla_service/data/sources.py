"""Images by number, with their labels: in memory, or in files decoded on demand."""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from tla_service.data.cache import content_digest
from tla_service.data.decoding import Blobs, Decoder, decode

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


class ArraySource:
    """Images held in memory.

    Args:
        images: All images (N, C, H, W), uint8, on the CPU; kept, not copied.
        labels: Their classes (N,), int64.
        digest: SHA-256 of the content, if known; otherwise computed on demand.

    Attributes:
        labels: Classes (N,), int64, on the CPU.
        image_shape: (C, H, W) of every image.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, digest: str | None = None) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or labels.shape != images.shape[:1]:
            raise ValueError(f"want (N,C,H,W) uint8 and (N,), got {tuple(images.shape)} {images.dtype}, {labels.shape}")
        self.images, self.labels = images, labels.to(torch.int64)
        self.image_shape: tuple[int, int, int] = (images.shape[1], images.shape[2], images.shape[3])
        self._digest = digest

    def __len__(self) -> int:
        return self.labels.numel()

    def fetch(self, indices: torch.Tensor) -> torch.Tensor:
        """Images at ``indices`` (n,), int64 in [0, N), on the CPU, repeats allowed: (n, C, H, W), uint8, on the CPU."""
        return self.images[indices]

    def subset(self, indices: torch.Tensor) -> "ArraySource":
        """The images at ``indices`` (n,), in that order."""
        return ArraySource(self.images[indices], self.labels[indices])

    def digest(self) -> str:
        """SHA-256 of every pixel and label, in order."""
        if self._digest is None:
            self._digest = content_digest(self.images, self.labels)
        return self._digest


class FileSource:
    """Images decoded on demand, with the interface of `ArraySource`; can be passed to loader processes.

    Args:
        blobs: The encoded images of the whole set.
        labels: Classes of this source's images (N,), int64.
        decoder: How to decode them.
        rows: Their rows in ``blobs`` (N,); all when ``None``.
    """

    def __init__(self, blobs: Blobs, labels: torch.Tensor, decoder: Decoder, rows: torch.Tensor | None = None) -> None:
        self._blobs, self._decoder = blobs, decoder
        self._rows = torch.arange(len(blobs)) if rows is None else rows
        self.labels = labels.to(torch.int64)
        self.image_shape = decoder.image_shape

    def __len__(self) -> int:
        return self.labels.numel()

    def fetch(self, indices: torch.Tensor) -> torch.Tensor:
        """As `ArraySource.fetch`, with errors as `Decoder`."""
        # Loader processes run in parallel already.
        threads = None if torch.utils.data.get_worker_info() is None else 1
        return decode(self._blobs, self._rows[indices].tolist(), self._decoder, threads)

    def subset(self, indices: torch.Tensor) -> "FileSource":
        """As `ArraySource.subset`."""
        return FileSource(self._blobs, self.labels[indices], self._decoder, self._rows[indices])

    def digest(self) -> str:
        """SHA-256 of the files' stamp (see each kind's ``stamp``), the rows, the labels and the decoding."""
        digest = hashlib.sha256(f"{self._blobs.stamp()}{self._decoder}".encode())
        digest.update(content_digest(self._rows, self.labels).encode())
        return digest.hexdigest()


ImageSource = ArraySource | FileSource


class Splits(NamedTuple):
    """What a loader returns to the catalog."""

    train: ImageSource
    test: ImageSource
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """An image classification task.

    Attributes:
        name: Its name in the configuration.
        train: Training images, validation images included.
        test: Test images.
        gate: Which test images are reserved for the promotion gate (N,), bool: the same ones under every
            ``test_limit``. Figures are published on the others.
        class_names: Name of every class; labels are positions in it.
        image_shape: Channels, height, width (C, H, W), the same in both splits.
        fingerprint: 16 hex digits that change when images, labels, their order or the class names change. For images
            in memory they cover every byte; for images decoded on demand names, sizes and labels, and the content by
            checksum (zip, Parquet) or by a sample of 256 files (folders).
    """

    name: str
    train: ImageSource
    test: ImageSource
    gate: torch.Tensor
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    fingerprint: str
