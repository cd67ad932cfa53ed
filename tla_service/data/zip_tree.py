"""Files of a data set in a zip file, read without unpacking it."""

import contextlib
import hashlib
import os
import posixpath
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tla_service.data.cache import disk_trouble
from tla_service.data.members import broken_link, is_member, link_loop
from tla_service.errors import UnavailableError

_FIX = "fetch the data set again, or point data.root at another copy"
# What zipfile raises for a damaged or unknown member.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError)
_ENCRYPTED, _UTF8 = 0x1, 0x800
_LINKS = 40  # as many as Linux follows


class ZipTree:
    """A zip file; a ``FileTree`` with the names that unpacking it would give.

    Args:
        path: The zip file.

    Raises:
        UnavailableError: If it is damaged, encrypted or may not be read, or leads outside of itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: dict[int, zipfile.ZipFile] = {}
        # Size and checksum; None for a link to nothing.
        self._entries: dict[str, tuple[int, int] | None] = {}
        # What the archive calls an entry, where that is another name.
        self._stored: dict[str, str] = {}
        links: dict[str, str] = {}
        folders: set[str] = set()
        for entry in self._open().infolist():
            inside = self._inside(entry)
            name = posixpath.normpath(inside)
            folders.add(name if inside.endswith("/") else posixpath.dirname(name))
            if inside.endswith("/"):
                continue
            if entry.flag_bits & _ENCRYPTED and is_member(name):
                remedy = "unpack it with its password and point data.root at the folder"
                raise UnavailableError("data.root", path, "is encrypted", remedy)
            self._add(name, (entry.file_size, entry.CRC), entry.filename)
            if stat.S_ISLNK(entry.external_attr >> 16):
                links[name] = self.read(name).decode("utf-8", errors="replace")
        folders = _with_parents(folders)
        # Hidden files are kept until here: links that are part of the set may lead to them.
        # Links to files go first: linked folders may hold some.
        for name, target in sorted(self._followed(links).items(), key=lambda pair: pair[1] in folders):
            self._resolve(name, target, is_folder=target in folders)
        self._entries = {name: entry for name, entry in self._entries.items() if is_member(name)}
        self.names = sorted(self._entries)
        folders |= _with_parents({posixpath.dirname(name) for name in self.names})
        self.folders = {name for name in folders if is_member(name)}

    def _add(self, name: str, entry: tuple[int, int] | None, stored: str) -> None:
        self._entries[name] = entry
        if stored != name:
            self._stored[name] = stored

    def _inside(self, entry: zipfile.ZipInfo) -> str:
        """The path that unpacking would give an entry; a folder's ends with a slash."""
        name = entry.filename
        if not entry.flag_bits & _UTF8:
            # macOS writes UTF-8 without saying so; what is not UTF-8 is left as zipfile reads it.
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
            at = link
            for _ in range(_LINKS):
                if at not in links:
                    break
                at = posixpath.normpath(posixpath.join(posixpath.dirname(at), links[at]))
            if at in links:
                at = ""  # links that lead to each other lead nowhere
            elif at == "." or f"{link}/".startswith(f"{at}/"):
                raise link_loop(self.describe(link))
            found[link] = at
        return found

    def _resolve(self, link: str, target: str, *, is_folder: bool) -> None:
        """Give a link the content of its target."""
        if not is_folder:
            self._add(link, self._entries.get(target), self._stored.get(target, target))
            return
        del self._entries[link]
        for name in [name for name in self._entries if name.startswith(f"{target}/")]:
            alias = f"{link}{name.removeprefix(target)}"
            self._add(alias, self._entries[name], self._stored.get(name, name))

    def _open(self) -> zipfile.ZipFile:
        # One handle a process: forked ones would share, and fight over, one file position.
        process = os.getpid()
        if process not in self._handles:
            with disk_trouble("data.root", self.path, "check the path and its permissions"):
                try:
                    self._handles[process] = zipfile.ZipFile(self.path)
                except (*_ZIP_ERRORS, NotImplementedError) as error:
                    reason = f"not a readable zip file ({error})"
                    raise UnavailableError("data.root", self.path, reason, _FIX) from error
        return self._handles[process]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def read(self, name: str) -> bytes:
        """The content of one file, checked against its checksum.

        Raises:
            UnavailableError: If it is missing, damaged or compressed in a way that Python does not know.
        """
        with disk_trouble("data.root", self.describe(name), _FIX):
            try:
                with self.open(name) as handle:
                    return handle.read()
            except _ZIP_ERRORS as error:
                raise UnavailableError("data.root", self.describe(name), f"damaged ({error})", _FIX) from error

    def open(self, name: str) -> IO[bytes]:
        """One file, opened.

        Raises:
            UnavailableError: As ``read``, or if it is a link to nothing.
        """
        self._entry(name)
        with disk_trouble("data.root", self.describe(name), _FIX):
            try:
                return self._open().open(self._stored.get(name, name))
            except NotImplementedError as error:
                reason = f"cannot be unpacked ({error})"
                raise UnavailableError("data.root", self.describe(name), reason, "unpack the zip file") from error
            except _ZIP_ERRORS as error:
                raise UnavailableError("data.root", self.describe(name), f"damaged ({error})", _FIX) from error

    def describe(self, name: str) -> str:
        """The zip file's path and the path inside."""
        return f"{self.path}/{name}"

    def stamp(self, names: Sequence[str]) -> str:
        """Covers every name, size and content, by the checksums that zip files carry."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}\0{self._entry(name)}\n".encode())
        return digest.hexdigest()

    def _entry(self, name: str) -> tuple[int, int]:
        found = self._entries[name]
        if found is None:
            raise broken_link(self.describe(name))
        return found

    def key(self, names: Sequence[str]) -> str:
        """Covers the zip file's place, and every file's name, size and checksum."""
        return hashlib.sha256(f"{self.path.absolute()}{self.stamp(names)}".encode()).hexdigest()[:24]


def _with_parents(folders: set[str]) -> set[str]:
    """Folders and all those above them."""
    found = set()
    for folder in folders - {"", "."}:
        parts = folder.split("/")
        found |= {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return found
