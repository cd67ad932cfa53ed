"""Files of a data set: which belong to it, for folders, zip files, buckets and Parquet; and folders of them."""

import contextlib
import hashlib
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from torch import distributed

from tla_service.config import DataConfig
from tla_service.data.cache import disk_trouble
from tla_service.data.decoding import evenly_spread
from tla_service.errors import ConfigError, UnavailableError

LOG = logging.getLogger(__name__)
# In order of preference: the first one with labels is the test set, the next one the validation set.
TEST_SPLITS = ("test", "val", "validation", "valid", "dev")
SPLITS = ("train", "validation", "test", "test_fraction")  # the settings that name them
HOLD_OUT = "hold a share of the training images out by data.test_fraction=0.2"
NO_TEST = f"name one by data.test, or {HOLD_OUT}"
_SHOWN = 6
_SAMPLED = 256
MOST_BYTES = 2**28  # of a file that is read whole: an image, or a list of classes
FIX = "fetch the data set again, or point data.root at another copy"
# What macOS, Windows and NAS systems leave between files, in lower case.
_SYSTEM_FILES = frozenset(
    {
        "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
        "@eadir", "#recycle", "#snapshot", "lost+found",
    }
)  # fmt: skip


def is_member(name: str) -> bool:
    """Whether a path inside a data set, with forward slashes, can be part of it: not hidden, not a system's file."""
    return not any(
        (part.startswith(".") and part not in (".", "..")) or part.casefold() in _SYSTEM_FILES
        for part in name.split("/")
    )


def refuse_several(root: str | None, sets: Iterable[str]) -> None:
    """Raise ConfigError if a root holds data sets in several folders, "" being itself: choosing would be a guess."""
    found = sorted({name.strip("/") or "." for name in sets})
    if len(found) > 1:
        reason = f"holds {len(found)} data sets: {listed(found)}"
        raise ConfigError("data.root", root, reason, "point it at one of them, or move the others out of it")


def refuse_settings(config: DataConfig, names: Iterable[str], reason: str, fitting: str) -> None:
    """Raise ConfigError if one of these settings of a data set is given, which only the ``fitting`` kinds have."""
    for name in names:
        if value := getattr(config, name):
            raise ConfigError(f"data.{name}", value, reason, f"leave it out, or set data.name={fitting}")


def choose_splits(config: DataConfig, there: Collection[str]) -> tuple[str, list[str], list[str]]:
    """Names of the training split and, in order of preference, of possible test and validation splits.

    Those that are named, or else those with usual names that are ``there``. ConfigError if one is named that is not
    there, or for two purposes.
    """
    train = config.train or "train"
    taken = {"data.test": config.test, "data.validation": config.validation or None, "data.train": train}
    if config.test is not None and config.test_fraction is not None:
        raise ConfigError("data.test_fraction", config.test_fraction, "data.test names the test set", "give only one")
    for field, name in taken.items():
        if name is None or (field == "data.train" and config.train is None):
            continue
        other = next((other for other, its in taken.items() if its == name and other != field), None)
        if other is not None:
            raise ConfigError(field, name, f"is {other}, too", "give splits with images of their own")
        if name not in there:
            reason = f"no such split in {config.root}"
            others = sorted(other for other in there if "/" not in other)
            raise ConfigError(field, name, reason, f"give one of: {listed(others)}" if others else "check data.root")
    tests = [name for name in TEST_SPLITS if name in there and name not in taken.values()]
    validations = [name for name in tests if name != "test"]
    if config.test is not None or config.test_fraction is not None:
        tests = [config.test] if config.test is not None else []
    if config.validation is not None:
        validations = [config.validation] if config.validation else []
    return train, tests, validations


def notice(text: str, *values: object) -> None:
    """Log a warning about the data; of processes that train together, only the first does."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        LOG.warning(text, *values)


def notice_left_out(root: str | None, files: Mapping[str, list[str]]) -> None:
    """Log in one line how many files of each ending are not used, and some of them, by the reason why."""
    parts = []
    for reason, names in files.items():
        counts = Counter(posixpath.splitext(name)[1].lower() or "without ending" for name in names)
        shown = listed([f"{count} {ending}" for ending, count in counts.most_common()])
        parts += [f"{shown} {reason}, such as {names[0]}"] if names else []
    if parts:
        notice("data.root=%s: files left out: %s", root, "; ".join(parts))


def listed(items: list[str]) -> str:
    """The first few of several things, and how many more there are."""
    more = len(items) - _SHOWN
    return ", ".join([*items[:_SHOWN], *([f"{more} more"] if more > 0 else [])])


class FolderTree:
    """Named files of a folder: those that ``is_member`` accepts, links followed.

    ``names`` (sorted) and ``folders`` (empty ones, too) are paths inside, with forward slashes. UnavailableError if it
    cannot be read, or a link in it leads back to a folder above.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folders: set[str] = set()
        # Size, and time of change in ns or checksum; None for a broken link.
        self._entries: dict[str, tuple[int, int] | None] = {}
        self._find()
        self.names = sorted(self._entries)

    def _find(self) -> None:
        with disk_trouble("data.root", self.path, "check the path and its permissions"):
            self._scan("", ())

    def _scan(self, inside: str, above: tuple[tuple[int, int], ...]) -> None:
        found = (self.path / inside).stat()
        here = (found.st_dev, found.st_ino)
        if here in above:
            raise self._link_loop(inside.rstrip("/"))
        with os.scandir(self.path / inside) as entries:
            for entry in entries:
                name = f"{inside}{entry.name}"
                if not is_member(entry.name):
                    continue
                if entry.is_dir():
                    self.folders.add(name)
                    self._scan(f"{name}/", (*above, here))
                elif entry.is_file():
                    found = entry.stat()
                    self._entries[name] = (found.st_size, found.st_ctime_ns)  # copies may keep the time of modification
                elif entry.is_symlink():
                    self._entries[name] = None

    def read(self, name: str) -> bytes:
        """The content of one file; UnavailableError as for `open`, or if it is far too large."""
        size, _ = self._entry(name)
        if size > MOST_BYTES:  # such as a small zip file that unpacks to terabytes
            reason = f"has {size} bytes, more than the {MOST_BYTES} of the largest file that is read"
            raise UnavailableError("data.root", self.describe(name), reason, "remove the file, or make it smaller")
        with self.open(name) as handle:
            return handle.read()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open one file for the block; UnavailableError, also in it, if it is missing, damaged, or a broken link."""
        self._entry(name)
        with disk_trouble("data.root", self.path / name, FIX), (self.path / name).open("rb", buffering=0) as handle:
            yield handle

    def stamp(self, names: Sequence[str]) -> str:
        """Hex digits that change with names, sizes, order, and the content of 256 files: more would take long."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(os.fsencode(f"{name}\0{self._entry(name)[0]}\n"))
        for row in evenly_spread(len(names), _SAMPLED):
            digest.update(self.read(names[row]))
        return digest.hexdigest()

    def key(self, names: Sequence[str]) -> str:
        """As ``stamp``, for caches on this machine: by paths, sizes and times of change, without reading content."""
        lines = ("\0".join(map(str, (name, *self._entry(name)))) for name in names)
        return hashlib.sha256(os.fsencode("\n".join([str(self.path.absolute()), *lines]))).hexdigest()[:24]

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


@dataclass(frozen=True)
class TreeBlobs:
    """Images that are files of a tree, by number; a ``Blobs``."""

    tree: FolderTree
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
        """See `FolderTree.stamp`."""
        return self.tree.stamp(self.names)
