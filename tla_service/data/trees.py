"""Files of a data set, by name: in a folder here, in a zip file in ``zip_tree``."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tla_service.data.cache import disk_trouble
from tla_service.data.decoding import evenly_spread
from tla_service.data.members import is_member
from tla_service.errors import UnavailableError

_SAMPLED = 256
FIX = "fetch the data set again, or point data.root at another copy"


class FileTree(ABC):
    """Named files that can be read: those that ``is_member`` accepts, links followed.

    Attributes:
        names: Paths inside, with forward slashes, sorted.
        folders: Paths of the folders inside, empty ones too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.folders: set[str] = set()
        # Size, and time of change in ns or checksum; None for a broken link.
        self._entries: dict[str, tuple[int, int] | None] = {}

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of one file; UnavailableError if it is missing, damaged or a broken link."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open one file to read a part of it; UnavailableError as for `read`."""

    @abstractmethod
    def stamp(self, names: Sequence[str]) -> str:
        """Hex digits that change with the files' names, sizes, order, and content as far as that is cheap."""

    @abstractmethod
    def key(self, names: Sequence[str]) -> str:
        """As ``stamp``, for caches on this machine: by paths, sizes and times, without reading content."""

    def describe(self, name: str) -> str:
        """A file's full path, for messages."""
        return f"{self.path}/{name}".rstrip("/")

    def _entry(self, name: str) -> tuple[int, int]:
        found = self._entries[name]
        if found is None:
            remedy = "restore what it points at, or remove the link"
            raise UnavailableError("data.root", self.describe(name), "is a link to a file that is not there", remedy)
        return found

    def _link_loop(self, name: str) -> UnavailableError:
        reason = "is a link to a folder that holds it"
        return UnavailableError("data.root", self.describe(name), reason, "remove the link")


class FolderTree(FileTree):
    """A folder; UnavailableError if it cannot be read, or a link in it leads back to a folder above."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with disk_trouble("data.root", path, "check the path and its permissions"):
            self._scan("", ())
        self.names = sorted(self._entries)

    def _scan(self, inside: str, above: tuple[tuple[int, int], ...]) -> None:
        here = (self.path / inside).stat()
        above = (*above, (here.st_dev, here.st_ino))
        with os.scandir(self.path / inside) as entries:
            for entry in entries:
                name = f"{inside}{entry.name}"
                if not is_member(entry.name):
                    continue
                if entry.is_dir():
                    found = entry.stat()
                    if (found.st_dev, found.st_ino) in above:
                        raise self._link_loop(name)
                    self.folders.add(name)
                    self._scan(f"{name}/", above)
                elif entry.is_file():
                    found = entry.stat()
                    self._entries[name] = (found.st_size, found.st_mtime_ns)
                elif entry.is_symlink():
                    self._entries[name] = None

    def read(self, name: str) -> bytes:
        """See `FileTree`."""
        with disk_trouble("data.root", self.path / name, FIX):
            return (self.path / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        """See `FileTree`."""
        self._entry(name)
        with disk_trouble("data.root", self.path / name, FIX):
            return (self.path / name).open("rb", buffering=0)

    def stamp(self, names: Sequence[str]) -> str:
        """Covers every name and size, and the content of 256 files: reading all would take minutes for a large set."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}\0{self._entry(name)[0]}\n".encode())
        for row in evenly_spread(len(names), _SAMPLED):
            digest.update(self.read(names[row]))
        return digest.hexdigest()

    def key(self, names: Sequence[str]) -> str:
        """Covers the folder, and every file's name, size and time of change."""
        lines = ("\0".join(map(str, (name, *self._entry(name)))) for name in names)
        return hashlib.sha256("\n".join([str(self.path.absolute()), *lines]).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class TreeBlobs:
    """Images that are files of a tree, by number; a ``Blobs``."""

    tree: FileTree
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> bytes:
        """The encoded image."""
        return self.tree.read(self.names[row])

    def name(self, row: int) -> str:
        """Its path."""
        return self.tree.describe(self.names[row])

    def stamp(self) -> str:
        """See `FileTree.stamp`."""
        return self.tree.stamp(self.names)
