"""Which files belong to a data set: one rule for folders, zip files, buckets and Parquet."""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import distributed

from tla_service.errors import ConfigError

LOG = logging.getLogger(__name__)
# In order of preference: the first one with labels is the test set.
TEST_SPLITS = ("test", "val", "validation", "valid", "dev")
_SHOWN = 6
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
    """Raise ConfigError if a root holds several data sets: choosing or merging them would be a guess.

    Args:
        root: ``data.root`` as configured.
        sets: Folder of each data set inside the root; "" is the root itself.
    """
    found = sorted({name.strip("/") or "." for name in sets})
    if len(found) > 1:
        reason = f"holds {len(found)} data sets: {listed(found)}"
        raise ConfigError("data.root", root, reason, "point it at one of them, or move the others out of it")


def notice(text: str, *values: object) -> None:
    """Log a warning about the data; of processes that train together, only the first does."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        LOG.warning(text, *values)


def notice_left_out(root: str | None, files: Mapping[str, Iterable[str]]) -> None:
    """Log in one line how many files of each ending are not used; names are given by the reason why."""
    counts = {reason: by_ending(names) for reason, names in files.items()}
    parts = [f"{shown} {reason}" for reason, shown in counts.items() if shown]
    if parts:
        notice("data.root=%s: files left out: %s", root, "; ".join(parts))


def by_ending(names: Iterable[str]) -> str:
    """Files counted by ending, such as ``8 .heic, 2 without ending``; empty for no files."""
    counts = Counter(posixpath.splitext(name)[1].lower() or "without ending" for name in names)
    return listed([f"{count} {ending}" for ending, count in counts.most_common()])


def listed(items: list[str]) -> str:
    """The first few of several things, and how many more there are."""
    more = len(items) - _SHOWN
    return ", ".join([*items[:_SHOWN], *([f"{more} more"] if more > 0 else [])])
