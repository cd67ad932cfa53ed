"""Encoded images concatenated in one file of the cache, for formats without random access."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tla_service.data.cache import cache_folder, cached_tensors, disk_trouble
from tla_service.errors import UnavailableError
from tla_service.files import whole_file

LOG = logging.getLogger(__name__)


class PackedBlobs:
    """Encoded images of one packed file; a ``Blobs``.

    Args:
        path: The file.
        offsets: Start of each image, and end of the last one (N + 1,), int64, in bytes.
        digest: SHA-256 of the file's content.
        origins: Name and first row of every original file, in order.
    """

    def __init__(self, path: Path, offsets: torch.Tensor, digest: str, origins: list[tuple[str, int]]) -> None:
        self._path, self._offsets, self._digest, self._origins = path, offsets, digest, origins

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, row: int) -> bytes:
        """The encoded image; UnavailableError if the cache was removed or truncated meanwhile."""
        start, end = self._offsets[row : row + 2].tolist()
        remedy = "start again: the file is then packed again"
        # Opened anew, so that threads and forked loaders share no file position.
        with disk_trouble("data.cache_dir", self._path, remedy), self._path.open("rb", buffering=0) as handle:
            handle.seek(start)
            blob = handle.read(end - start)
        if len(blob) != end - start:
            raise UnavailableError("data.cache_dir", self._path, "is truncated", "remove it and start again")
        return blob

    def name(self, row: int) -> str:
        """The original file and the row in it."""
        file, first = self._origins[bisect_right([first for _, first in self._origins], row) - 1]
        return f"{file}, row {row - first}"

    def stamp(self) -> str:
        """Covers every byte and offset."""
        return hashlib.sha256(self._digest.encode() + self._offsets.numpy().tobytes()).hexdigest()


def pack(
    cache_dir: str, key: str, images: Callable[[], Iterator[bytes]], origins: list[tuple[str, int]]
) -> PackedBlobs:
    """Concatenate images, once per node, in the file of a key that changes with them; arguments as `PackedBlobs`."""
    path = cache_folder(cache_dir, "packed") / f"{key}.blobs"

    def build() -> dict[str, torch.Tensor]:
        offsets, digest = [0], hashlib.sha256()
        remedy = "free some space, or give another folder"
        with disk_trouble("data.cache_dir", path, remedy), whole_file(path) as part, part.open("wb") as handle:
            for blob in images():
                handle.write(blob)
                digest.update(blob)
                offsets.append(offsets[-1] + len(blob))
        return {
            "offsets": torch.tensor(offsets),
            "digest": torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8),
        }

    index = cached_tensors(cache_dir, f"{key}-index", build)[0]
    if not path.is_file() or path.stat().st_size != int(index["offsets"][-1]):
        LOG.warning("packing %s again: it is missing or truncated", path)
        (cache_folder(cache_dir, "decoded") / f"{key}-index.safetensors").unlink(missing_ok=True)
        index = cached_tensors(cache_dir, f"{key}-index", build)[0]
    return PackedBlobs(path, index["offsets"], bytes(index["digest"].tolist()).hex(), origins)
