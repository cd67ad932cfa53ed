"""Files of a data set in a zip file, read without unpacking it."""

import contextlib
import hashlib
import lzma
import os
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tla_service.data.cache import disk_trouble
from tla_service.data.trees import FIX, FolderTree, is_member
from tla_service.errors import UnavailableError

# What zipfile raises for a damaged or unknown member; NotImplementedError is a RuntimeError.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, KeyError, ValueError,
)  # fmt: skip
_ENCRYPTED, _UTF8 = 0x1, 0x800
_END_MARK, _END_BYTES = b"PK\5\6", 22  # of the record at the end, without the comment that follows it
_LINKS = 40  # Linux's limit
_MOST_ALIASES = 10_000_000  # names looked at to follow links to folders; links to links can stand for 2^40


class ZipTree(FolderTree):
    """A zip file, with the names that unpacking it would give; refused if encrypted, or if names lead outside of it."""

    def _find(self) -> None:
        self._handles: dict[int, zipfile.ZipFile] = {}
        self._stored: dict[str, str] = {}  # the archive's names of the entries
        self._aliases = 0
        links: dict[str, str] = {}
        folders: set[str] = set()
        for entry in self._listed():
            inside = self._inside(entry)
            name = posixpath.normpath(inside)
            folders.add(name if inside.endswith("/") else posixpath.dirname(name))
            if inside.endswith("/"):
                continue
            if entry.flag_bits & _ENCRYPTED and is_member(name):
                remedy = "unpack it with its password and point data.root at the folder"
                raise UnavailableError("data.root", self.path, "is encrypted", remedy)
            self._entries[name], self._stored[name] = (entry.file_size, entry.CRC), entry.filename
            if stat.S_ISLNK(entry.external_attr >> 16):
                links[name] = self.read(name).decode("utf-8", errors="replace")
        folders = with_parents(folders)
        # Hidden files are kept until here, since links may lead to them. Links to files come first, since linked
        # folders may hold some.
        for name, target in sorted(self._followed(links).items(), key=lambda pair: pair[1] in folders):
            self._resolve(name, target, is_folder=target in folders)
        self._entries = {name: entry for name, entry in self._entries.items() if is_member(name)}
        folders |= with_parents(map(posixpath.dirname, self._entries))
        self.folders = set(filter(is_member, folders))

    def _listed(self) -> list[zipfile.ZipInfo]:
        """The entries; zipfile does not compare them with their number, and drops some if a length is damaged."""
        archive = self._open()
        entries = archive.infolist()
        with disk_trouble("data.root", self.path, FIX), self.path.open("rb") as file:
            # Before a comment, and bytes that a transfer may have added.
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES - 2**16))
            tail = file.read()
            end = tail[tail.rfind(_END_MARK) :]
        number = int.from_bytes(end[10:12], "little")
        if number not in (len(entries) % 2**16, 2**16 - 1):  # the latter of files whose number does not fit
            raise UnavailableError("data.root", self.path, f"damaged (it lists {len(entries)} of {number} files)", FIX)
        return entries

    def _inside(self, entry: zipfile.ZipInfo) -> str:
        """The path that unpacking would give an entry; a folder's ends with a slash."""
        name = entry.filename
        if not entry.flag_bits & _UTF8:
            # macOS writes UTF-8 without the flag; other names stay as zipfile reads them.
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode("utf-8")
        if entry.create_system == 0:
            name = name.replace("\\", "/")  # some Windows tools
        if name.startswith("/") or ".." in name.split("/"):
            reason = f"has an entry {entry.filename!r} that leads outside of it"
            raise UnavailableError("data.root", self.path, reason, "pack it again with relative paths")
        return name

    def _followed(self, links: dict[str, str]) -> dict[str, str]:
        """Where each link leads in the end: a path inside the archive, which need not exist."""
        found = {}
        for link in links:
            at, followed = link, 0
            while at in links and followed < _LINKS:
                at, followed = posixpath.normpath(posixpath.join(posixpath.dirname(at), links[at])), followed + 1
            if at in links:
                at = ""  # links that lead to each other lead nowhere
            elif at == "." or f"{link}/".startswith(f"{at}/"):
                raise self._link_loop(link)
            found[link] = at
        return found

    def _resolve(self, link: str, target: str, *, is_folder: bool) -> None:
        if not is_folder:
            self._entries[link], self._stored[link] = self._entries.get(target), self._stored.get(target, target)
            return
        del self._entries[link]
        self._aliases += len(self._entries)
        if self._aliases > _MOST_ALIASES:
            remedy = "unpack it, and point data.root at the folder"
            raise UnavailableError("data.root", self.path, "its links to folders multiply its files", remedy)
        for name in [name for name in self._entries if name.startswith(f"{target}/")]:
            alias = f"{link}{name.removeprefix(target)}"
            self._entries[alias], self._stored[alias] = self._entries[name], self._stored[name]

    def _open(self) -> zipfile.ZipFile:
        # One handle per process: forked ones would share one file position.
        process = os.getpid()
        if process not in self._handles:
            with disk_trouble("data.root", self.path, "check the path and its permissions"):
                try:
                    self._handles[process] = zipfile.ZipFile(self.path)
                except _ZIP_ERRORS as error:
                    with self.path.open("rb") as file:
                        remedy = FIX if file.read(2) == b"PK" else "unpack it, and point data.root at the folder"
                    reason = f"not a readable zip file ({error})"
                    raise UnavailableError("data.root", self.path, reason, remedy) from error
        return self._handles[process]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """See `FolderTree`; content that is read to its end is checked against its checksum."""
        self._entry(name)
        with disk_trouble("data.root", self.describe(name), FIX):
            try:
                with self._open().open(self._stored[name]) as handle:
                    yield handle
            except NotImplementedError as error:
                reason = f"cannot be unpacked ({error})"
                raise UnavailableError("data.root", self.describe(name), reason, "unpack the zip file") from error
            except _ZIP_ERRORS as error:
                raise UnavailableError("data.root", self.describe(name), f"damaged ({error})", FIX) from error

    def stamp(self, names: Sequence[str]) -> str:
        """Covers every name, size and content, by the checksums that zip files carry."""
        lines = (f"{name}\0{self._entry(name)}\n" for name in names)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def key(self, names: Sequence[str]) -> str:
        """Covers the zip file's path, and every file's name, size and checksum."""
        return hashlib.sha256(os.fsencode(f"{self.path.absolute()}{self.stamp(names)}")).hexdigest()[:24]


def open_tree(path: Path, zip_pattern: str = "*.zip") -> FolderTree:
    """Open a folder, a zip file, or the only zip file of a pattern in a folder without subfolders."""
    if path.is_dir():
        with disk_trouble("data.root", path, "check the path and its permissions"):
            zips = [found for found in path.glob(zip_pattern) if is_member(found.name)]
            folders = any(entry.is_dir() and is_member(entry.name) for entry in path.iterdir())
        return ZipTree(zips[0]) if len(zips) == 1 and not folders else FolderTree(path)
    return ZipTree(path)


def with_parents(folders: Iterable[str]) -> set[str]:
    """Folders and all those above them."""
    paths = {PurePosixPath(folder) for folder in folders}
    return {str(above) for path in paths for above in (path, *path.parents)} - {"."}
