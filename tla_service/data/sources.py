"""Images by number, with their labels: in memory, or in files decoded on demand."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as PIL_VERSION

from tla_service.config import DataConfig
from tla_service.data.cache import cached_tensors, content_digest
from tla_service.data.decoding import Blobs, Decoder, decode, open_image, probe
from tla_service.data.trees import FolderTree, TreeBlobs
from tla_service.pixels import ImageShape

# The largest training set, as decoded uint8 pixels, that data.residency=auto keeps in memory.
RESIDENT_BYTES = 4 * 2**30


class ArraySource:
    """Images (N, C, H, W), uint8, in memory, not copied; classes (N,), int64; a digest, if known; and their files."""

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, digest: str | None = None, files: "FileSource | None" = None
    ) -> None:
        self.images, self.labels = images, labels.to(torch.int64)
        self.image_shape: ImageShape = (images.shape[1], images.shape[2], images.shape[3])
        self._digest, self._files = digest, files

    def __len__(self) -> int:
        return self.labels.numel()

    def fetch(self, indices: torch.Tensor) -> torch.Tensor:
        """Images at ``indices`` (n,), int64 in [0, N), on the CPU, repeats allowed: (n, C, H, W), uint8, on the CPU."""
        return self.images[indices]

    def look(self, row: int) -> tuple[str, Image.Image, np.ndarray]:
        """Name of an image, the image as it is stored, and its pixels as `fetch` gives them (C, H, W)."""
        pixels = self.images[row].numpy()
        picture = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)
        return f"image {row}", Image.fromarray(np.ascontiguousarray(picture)), pixels

    def subset(self, indices: torch.Tensor) -> "ArraySource":
        """The images at ``indices`` (n,), in that order."""
        files = None if self._files is None else self._files.subset(indices)
        return ArraySource(self.images[indices], self.labels[indices], files=files)

    def digest(self) -> str:
        """SHA-256 of every pixel and label, in order."""
        if self._digest is None:
            self._digest = content_digest(self.images, self.labels)
        return self._digest

    def files_digest(self) -> str:
        """`FileSource.digest` of the files that were decoded; empty if the images are not from files of their own."""
        return "" if self._files is None else self._files.digest()


class FileSource:
    """As `ArraySource`, but decoded on demand from ``rows`` (N,) of ``blobs`` (default: all); can be pickled."""

    def __init__(self, blobs: Blobs, labels: torch.Tensor, decoder: Decoder, rows: torch.Tensor | None = None) -> None:
        self._blobs, self._decoder = blobs, decoder
        self._rows = torch.arange(len(blobs)) if rows is None else rows
        self._digest = ""
        self.labels = labels.to(torch.int64)
        self.image_shape = decoder.image_shape

    def __len__(self) -> int:
        return self.labels.numel()

    def look(self, row: int) -> tuple[str, Image.Image, np.ndarray]:
        """As `ArraySource.look`, with errors as `Decoder`."""
        place = int(self._rows[row])
        name = self._blobs.name(place)
        image = open_image(self._blobs.read(place), name)
        return name, image, self._decoder.pixels(image, name)

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
        if not self._digest:  # stamps read files
            content = content_digest(self._rows, self.labels)
            self._digest = hashlib.sha256(f"{self._blobs.stamp()}{self._decoder}{content}".encode()).hexdigest()
        return self._digest

    files_digest = digest


ImageSource = ArraySource | FileSource
SourceRows = tuple[ImageSource, torch.Tensor]  # some of its images: their numbers (n,), int64


class JoinedSource:
    """The images of one source, and after them those of another of the same shape."""

    def __init__(self, first: ImageSource, second: ImageSource) -> None:
        self.parts, self.labels = (first, second), torch.cat([first.labels, second.labels])

    def fetch(self, indices: torch.Tensor) -> torch.Tensor:
        """As `ArraySource.fetch`."""
        first, second = self.parts
        is_second = indices >= len(first)
        images = torch.cat([first.fetch(indices[~is_second]), second.fetch(indices[is_second] - len(first))])
        return images[is_second.argsort(stable=True).argsort()]


class Splits(NamedTuple):
    """What a loader returns to the catalog; without ``test``, a share of the training images is to be held out."""

    class_names: tuple[str, ...]
    train: ImageSource
    test: ImageSource | None = None
    validation: ImageSource | None = None


@dataclass(frozen=True)
class Dataset:
    """An image classification task.

    Attributes:
        gate: Which test images are reserved for the promotion gate (N,), bool: the same ones under every
            ``test_limit``. Figures are published on the others.
        fingerprint: 16 hex digits that change when images, labels, their order or the class names change. For images
            in memory they cover every byte; for images decoded on demand names, sizes and labels, and the content by
            checksum (zip, Parquet) or by a sample of 256 files (folders). Of the training and test images alone.
        validation: Validation images, if the set has a split of them; else they are held out of ``train``.
    """

    name: str
    train: ImageSource
    test: ImageSource
    gate: torch.Tensor
    class_names: tuple[str, ...]
    fingerprint: str
    validation: ImageSource | None = None

    @property
    def image_shape(self) -> ImageShape:
        """(C, H, W) of all images."""
        return self.train.image_shape


def build_splits(
    config: DataConfig,
    key: str,
    parts: Mapping[str, tuple[Blobs, torch.Tensor]],
    class_names: tuple[str, ...],
    *,
    colour: bool | None = None,
) -> Splits:
    """Encoded images with their classes (N,), as sources: in memory or not, by ``data.residency`` and their size.

    ``parts`` are the splits (train, test, validation); ``key`` changes with their files, order and content; ``colour``
    is that of `probe`.
    """
    images = parts["train"][0]
    decoder = probe(images, config.image_size, colour=colour)
    channels, height, width = decoder.image_shape
    size = len(images) * channels * height * width
    streamed = {name: FileSource(*part, decoder) for name, part in parts.items()}
    if config.residency == "stream" or (config.residency == "auto" and size >= RESIDENT_BYTES):
        return Splits(class_names, **streamed)

    def build() -> dict[str, torch.Tensor]:
        return {name: decode(blobs, range(len(blobs)), decoder) for name, (blobs, _) in parts.items()}

    # Labels are not cached, so the key need not cover how they are read. JPEG pixels depend on the decoder's version.
    sizes = "-".join(str(len(blobs)) for blobs, _ in parts.values())
    untested = "" if "test" in parts else "-untested"  # else train and validation would share a key with train and test
    full_key = f"{key}-{sizes}-{channels}x{height}x{width}{'r' if decoder.resize else ''}-{PIL_VERSION}{untested}"
    decoded, digests = cached_tensors(config.cache_dir, full_key, build)
    made = {
        name: ArraySource(decoded[name], labels, content_digest(labels) + digests[name], streamed[name])
        for name, (_, labels) in parts.items()
    }
    return Splits(class_names, **made)


def tree_splits(
    config: DataConfig,
    tree: FolderTree,
    parts: Mapping[str, Sequence[tuple[str, int]]],
    class_names: tuple[str, ...],
    *,
    colour: bool | None = None,
) -> Splits:
    """As `build_splits`, for images that are files of a tree: (name, class) of each."""
    blobs = {
        part: (TreeBlobs(tree, [name for name, _ in images]), torch.tensor([label for _, label in images]))
        for part, images in parts.items()
    }
    key = tree.key([name for images in parts.values() for name, _ in images])
    return build_splits(config, key, blobs, class_names, colour=colour)
