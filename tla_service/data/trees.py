"""Files of a data set, in a folder or straight from a zip file."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tla_service.data.cache import disk_trouble
from tla_service.data.decoding import evenly_spread
from tla_service.errors import UnavailableError

_SAMPLED = 256
_FIX = "fetch the data set again, or point data.root at another copy"
# What zipfile raises for a damaged, encrypted or unknown member.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, KeyError)


class FileTree(Protocol):
    """Named files that can be read.

    Attributes:
        path: The folder or the zip file.
        names: Paths inside, with forward slashes, sorted.
    """

    path: Path
    names: list[str]

    def read(self, name: str) -> bytes:
        """The content of one file."""

    def describe(self, name: str) -> str:
        """What to call a file in a message."""

    def stamp(self, names: Sequence[str]) -> str:
        """Hex digits that change with the files' names, sizes, order, and content as far as that is cheap."""

    def key(self, names: Sequence[str]) -> str:
        """As ``stamp``, but by place and time of the files, for caches on this machine: reads no content."""


class FolderTree:
    """A folder; hidden files are left out.

    Args:
        path: The folder.

    Raises:
        UnavailableError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sizes: dict[str, int] = {}
        self._times: dict[str, int] = {}
        with disk_trouble("data.root", path, "check the path and its permissions"):
            self._scan("")
        self.names = sorted(self._sizes)

    def _scan(self, inside: str) -> None:
        with os.scandir(self.path / inside) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    self._scan(f"{inside}{entry.name}/")
                elif entry.is_file():
                    name, stat = f"{inside}{entry.name}", entry.stat()
                    self._sizes[name], self._times[name] = stat.st_size, stat.st_mtime_ns

    def read(self, name: str) -> bytes:
        """The content of one file.

        Raises:
            UnavailableError: If it is gone or may not be read.
        """
        with disk_trouble("data.root", self.path / name, _FIX):
            return (self.path / name).read_bytes()

    def describe(self, name: str) -> str:
        """Its full path."""
        return str(self.path / name)

    def stamp(self, names: Sequence[str]) -> str:
        """Covers every name and size, and the content of 256 files: reading all would take minutes for a large set."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}\0{self._sizes.get(name)}\n".encode())
        for place in evenly_spread(len(names), _SAMPLED):
            digest.update(self.read(names[place]))
        return digest.hexdigest()

    def key(self, names: Sequence[str]) -> str:
        """Covers the folder, and every file's name, size and time of change."""
        lines = (f"{name}\0{self._sizes.get(name)}\0{self._times.get(name)}" for name in names)
        return hashlib.sha256("\n".join([str(self.path.absolute()), *lines]).encode()).hexdigest()[:24]


class ZipTree:
    """A zip file, read without unpacking it.

    Args:
        path: The zip file.

    Raises:
        UnavailableError: If it is damaged or may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: dict[int, zipfile.ZipFile] = {}
        entries = [entry for entry in self._open().infolist() if not entry.is_dir()]
        self._entries = {entry.filename: (entry.file_size, entry.CRC) for entry in entries}
        self.names = sorted(self._entries)

    def _open(self) -> zipfile.ZipFile:
        # One handle a process: forked ones would share, and fight over, one file position.
        process = os.getpid()
        if process not in self._handles:
            with disk_trouble("data.root", self.path, "check the path and its permissions"):
                try:
                    self._handles[process] = zipfile.ZipFile(self.path)
                except _ZIP_ERRORS as error:
                    reason = f"not a readable zip file ({error})"
                    raise UnavailableError("data.root", self.path, reason, _FIX) from error
        return self._handles[process]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def read(self, name: str) -> bytes:
        """The content of one file, checked against its checksum.

        Raises:
            UnavailableError: If it is missing or damaged.
        """
        archive = self._open()
        with disk_trouble("data.root", self.describe(name), _FIX):
            try:
                return archive.read(name)
            except _ZIP_ERRORS as error:
                raise UnavailableError("data.root", self.describe(name), f"damaged ({error})", _FIX) from error

    def describe(self, name: str) -> str:
        """The zip file's path and the path inside."""
        return f"{self.path}/{name}"

    def stamp(self, names: Sequence[str]) -> str:
        """Covers every name, size and content, by the checksums that zip files carry."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}\0{self._entries.get(name)}\n".encode())
        return digest.hexdigest()

    def key(self, names: Sequence[str]) -> str:
        """Covers the zip file's place, and every file's name, size and checksum."""
        return hashlib.sha256(f"{self.path.absolute()}{self.stamp(names)}".encode()).hexdigest()[:24]


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
            zips = sorted(path.glob(zip_pattern))
            folders = any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir())
        return ZipTree(zips[0]) if len(zips) == 1 and not folders else FolderTree(path)
    return ZipTree(path)
