"""A local copy of remote objects that is either right or not used: knows files and locks, not the protocol."""

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from tla_service.data.cache import disk_trouble, locked
from tla_service.errors import UnavailableError
from tla_service.files import whole_file, write_whole

LOG = logging.getLogger(__name__)
PARALLEL_DOWNLOADS = 8
_ROUNDS = 4
_SAVE_SECONDS = 5.0
_PLAIN_MD5 = re.compile(r"[0-9a-f]{32}")
_DISK_FIX = "free some space, or give another data.cache_dir"


@dataclass(frozen=True)
class RemoteObject:
    """One object of a listing.

    Attributes:
        name: Path below the root, with forward slashes.
        size: Bytes.
        etag: What the store calls this version, without quotes.
    """

    name: str
    size: int
    etag: str

    @property
    def md5(self) -> str | None:
        """MD5 of the content, when the ETag looks like one; objects uploaded in parts have another kind."""
        return self.etag if _PLAIN_MD5.fullmatch(self.etag) else None


class Kept(NamedTuple):
    """What the manifest says of a file: which version it is, and by what it is known again."""

    etag: str
    size: int
    modified_ns: int


class ObjectChangedError(Exception):
    """An object is no longer the version that was listed."""


class RemoteStore(Protocol):
    """Where objects come from."""

    def objects(self) -> list[RemoteObject]:
        """List all objects below the root."""

    def download(self, wanted: RemoteObject, part: Path) -> None:
        """Write one object, of exactly the listed version and checked, into a file.

        Raises:
            ObjectChangedError: If it is another version by now.
        """


def mirror(store: RemoteStore, home: Path, root: str) -> Path:
    """Bring a local copy up to date and return its folder.

    One process works at a time, the others wait and find the work done. A file is downloaded under another name and
    renamed when it is complete and checked; whatever a killed process left behind is never used. New and changed
    objects are fetched, removed ones removed.

    Args:
        store: Where the objects are.
        home: Folder of this root in the cache: the copy, its manifest, its lock.
        root: The address, for messages.

    Raises:
        UnavailableError: If objects cannot be read, keep changing, or do not fit on the disk.
    """
    folder, manifest = home / "objects", home / "manifest.json"
    with locked(home / "lock"), disk_trouble("data.cache_dir", home, _DISK_FIX):
        folder.mkdir(exist_ok=True)
        for _ in range(_ROUNDS):
            wanted = {item.name: item for item in store.objects()}
            for name in wanted:
                _refuse_strange(name, root)
            try:
                _update(store, folder, manifest, wanted)
            except ObjectChangedError as error:
                LOG.warning("%s changed while it was copied (%s); listing it again", root, error)
                continue
            return folder
    raise UnavailableError("data.root", root, "its objects keep changing", "wait until the upload is done")


def _refuse_strange(name: str, root: str) -> None:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise UnavailableError("data.root", root, f"key {name!r} is no usable file name", "rename the object")


def _update(store: RemoteStore, folder: Path, manifest: Path, wanted: Mapping[str, RemoteObject]) -> None:
    kept = _read_manifest(manifest)
    _remove_others(folder, wanted)
    have = {name: entry for name, item in wanted.items() if (entry := _current(folder / name, item, kept.get(name)))}
    missing = [item for name, item in wanted.items() if name not in have]
    try:
        if missing:
            _fetch(store, folder, manifest, missing, have)
    finally:
        if have != kept:
            _write_manifest(manifest, have)


def _fetch(
    store: RemoteStore, folder: Path, manifest: Path, missing: list[RemoteObject], have: dict[str, Kept]
) -> None:
    LOG.info("copying %d objects, %.1f MB, into %s", len(missing), sum(item.size for item in missing) / 1e6, folder)

    def fetch_one(item: RemoteObject) -> Kept:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            store.download(item, part)
        return Kept(item.etag, item.size, path.stat().st_mtime_ns)

    saved = time.monotonic()
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        futures = {pool.submit(fetch_one, item): item for item in missing}
        try:
            for future in as_completed(futures):
                have[futures[future].name] = future.result()
                if time.monotonic() - saved > _SAVE_SECONDS:
                    # So that a killed process need not fetch everything again.
                    _write_manifest(manifest, have)
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _current(path: Path, item: RemoteObject, kept: Kept | None) -> Kept | None:
    """What to note of a file that is the wanted version, else ``None``."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.st_size != item.size or not path.is_file():
        return None
    found = Kept(item.etag, stat.st_size, stat.st_mtime_ns)
    if kept == found:
        return found
    # Not as noted: from a process killed before it could note it, or touched since. Only its content can tell.
    return found if item.md5 is not None and file_md5(path) == item.md5 else None


def file_md5(path: Path) -> str:
    """MD5 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _remove_others(folder: Path, wanted: Mapping[str, RemoteObject]) -> None:
    """Remove what is not in the listing: removed objects, unfinished downloads, folders that are files now."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in wanted:
            path.unlink(missing_ok=True)


def _read_manifest(path: Path) -> dict[str, Kept]:
    """The manifest; empty when missing or unreadable, which costs a check of every file."""
    try:
        entries = json.loads(path.read_bytes()).items()
        return {str(name): Kept(str(etag), int(size), int(ns)) for name, (etag, size, ns) in entries}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_manifest(path: Path, have: Mapping[str, Kept]) -> None:
    write_whole(path, json.dumps(dict(sorted(have.items())), indent=0))
