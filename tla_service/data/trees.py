"""Files of a data set: in a folder here, in a zip file in ``zip_tree``."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from tla_service.data.cache import disk_trouble
from tla_service.data.decoding import evenly_spread
from tla_service.data.members import broken_link, is_member, link_loop
from tla_service.data.zip_tree import ZipTree

_SAMPLED = 256
_FIX = "fetch the data set again, or point data.root at another copy"


class FileTree(Protocol):
    """Named files that can be read: those that ``is_member`` lets in, links followed.

    Attributes:
        path: The folder or the zip file.
        names: Paths inside, with forward slashes, sorted.
        folders: Paths of the folders inside, empty ones too.
    """

    path: Path
    names: list[str]
    folders: set[str]

    def read(self, name: str) -> bytes:
        """The content of one file."""

    def open(self, name: str) -> IO[bytes]:
        """One file, opened to read a part of it."""

    def describe(self, name: str) -> str:
        """What to call a file in a message."""

    def stamp(self, names: Sequence[str]) -> str:
        """Hex digits that change with the files' names, sizes, order, and content as far as that is cheap."""

    def key(self, names: Sequence[str]) -> str:
        """As ``stamp``, but by place and time of the files, for caches on this machine: reads no content.

        Raises:
            UnavailableError: If one of the files is a link to nothing.
        """


class FolderTree:
    """A folder.

    Args:
        path: The folder.

    Raises:
        UnavailableError: If it cannot be read, or a link in it leads back to a folder above.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folders: set[str] = set()
        # Size and time of change in ns; None for a link to nothing.
        self._stats: dict[str, tuple[int, int] | None] = {}
        with disk_trouble("data.root", path, "check the path and its permissions"):
            self._scan("", ())
        self.names = sorted(self._stats)

    def _scan(self, inside: str, above: tuple[tuple[int, int], ...]) -> None:
        here = (self.path / inside).stat()
        above = (*above, (here.st_dev, here.st_ino))
        with os.scandir(self.path / inside) as entries:
            for entry in entries:
                if not is_member(entry.name):
                    continue
                name = f"{inside}{entry.name}"
                if entry.is_dir():
                    found = entry.stat() if entry.is_symlink() else None
                    if found is not None and (found.st_dev, found.st_ino) in above:
                        raise link_loop(self.path / name)
                    self.folders.add(name)
                    self._scan(f"{name}/", above)
                elif entry.is_file():
                    found = entry.stat()
                    self._stats[name] = (found.st_size, found.st_mtime_ns)
                elif entry.is_symlink():
                    self._stats[name] = None

    def read(self, name: str) -> bytes:
        """The content of one file.

        Raises:
            UnavailableError: If it is gone or may not be read.
        """
        with disk_trouble("data.root", self.path / name, _FIX):
            return (self.path / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        """One file, opened.

        Raises:
            UnavailableError: If it is gone, a link to nothing, or may not be read.
        """
        self._stat(name)
        path = self.path / name
        with disk_trouble("data.root", path, _FIX):
            return path.open("rb", buffering=0)

    def describe(self, name: str) -> str:
        """Its full path."""
        return str(self.path / name)

    def stamp(self, names: Sequence[str]) -> str:
        """Covers every name and size, and the content of 256 files: reading all would take minutes for a large set."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}\0{self._stat(name)[0]}\n".encode())
        for place in evenly_spread(len(names), _SAMPLED):
            digest.update(self.read(names[place]))
        return digest.hexdigest()

    def key(self, names: Sequence[str]) -> str:
        """Covers the folder, and every file's name, size and time of change."""
        lines = ("\0".join(map(str, (name, *self._stat(name)))) for name in names)
        return hashlib.sha256("\n".join([str(self.path.absolute()), *lines]).encode()).hexdigest()[:24]

    def _stat(self, name: str) -> tuple[int, int]:
        found = self._stats[name]
        if found is None:
            raise broken_link(self.describe(name))
        return found


class TreeBlobs:
    """Images that are files of a tree, by number.

    Args:
        tree: Where they are.
        names: Their paths inside it.
    """

    def __init__(self, tree: FileTree, names: Sequence[str]) -> None:
        self._tree, self._names = tree, names

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def read(self, row: int) -> bytes:
        """The encoded image."""
        return self._tree.read(self._names[row])

    def name(self, row: int) -> str:
        """Its path."""
        return self._tree.describe(self._names[row])

    def stamp(self) -> str:
        """See the tree's ``stamp``."""
        return self._tree.stamp(self._names)


def open_tree(path: Path, zip_pattern: str = "*.zip") -> FileTree:
    """Open a folder, a zip file, or the only zip file in an otherwise empty folder.

    Args:
        path: What ``data.root`` points at.
        zip_pattern: Names of zip files to look for in a folder.

    Raises:
        UnavailableError: If it is neither, or cannot be read.
    """
    if path.is_dir():
        with disk_trouble("data.root", path, "check the path and its permissions"):
            zips = [found for found in path.glob(zip_pattern) if is_member(found.name)]
            folders = any(entry.is_dir() and is_member(entry.name) for entry in path.iterdir())
        return ZipTree(zips[0]) if len(zips) == 1 and not folders else FolderTree(path)
    return ZipTree(path)
