"""Parquet files of a data set: finding them, their schemas, reading a column."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tla_service.data.members import TEST_SPLITS, notice, refuse_several
from tla_service.data.trees import FolderTree
from tla_service.errors import UnavailableError

if TYPE_CHECKING:
    import pyarrow

_NAME = re.compile(rf"({'|'.join(('train', *TEST_SPLITS))})(-.*)?\.parquet")
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


@dataclass(frozen=True)
class Shard:
    """One file of a split, with its number of rows and its schema."""

    path: Path
    rows: int
    schema: "pyarrow.Schema"


def find_splits(root: Path) -> dict[str, list[Path]] | None:
    """Files of each split, at any depth of a folder, sorted by path; ``None`` without training or test files.

    Files of no split are under "".
    """
    if not root.is_dir():
        return None
    found: dict[str, list[Path]] = {}
    for name in FolderTree(root).names:
        path = root / name
        match = _NAME.fullmatch(path.name)
        if match or path.suffix == ".parquet":
            found.setdefault(match[1] if match else "", []).append(path)
    if "train" not in found or found.keys().isdisjoint(TEST_SPLITS):
        return None
    return {name: sorted(paths) for name, paths in found.items()}


def open_shards(files: list[Path], root: Path, shown_root: str | None) -> list[Shard]:
    """Rows and schemas of one split's files below a root, which messages show as ``shown_root``.

    Raises:
        ConfigError: If they are in several folders, and so of several data sets.
        UnavailableError: If one is damaged, or there are no rows.
    """
    refuse_several(shown_root, [path.parent.relative_to(root).as_posix() for path in files])
    numbered = [match for path in files if (match := _NUMBERED.search(path.name))]
    for total in sorted({match[2] for match in numbered}):
        there = len({match[1] for match in numbered if match[2] == total})
        if there < int(total):
            notice("%s: only %d of %d files are there", files[0], there, int(total))
    shards = [_shard(path) for path in files]
    if not any(shard.rows for shard in shards):
        remedy = "fetch the file again, or point data.root at another copy"
        raise UnavailableError("data.root", files[0], "holds no rows", remedy)
    return shards


def _shard(path: Path) -> Shard:
    from pyarrow import parquet

    with _readable(path), parquet.ParquetFile(path) as opened:
        return Shard(path, opened.metadata.num_rows, opened.schema_arrow)


def read_column(path: Path, column: str, batch: int) -> Iterator["pyarrow.Array"]:
    """One column of a file, in arrays of up to ``batch`` rows; UnavailableError if the file is damaged."""
    from pyarrow import parquet

    with _readable(path), parquet.ParquetFile(path) as opened:
        for rows in opened.iter_batches(batch, columns=[column]):
            yield rows.column(column)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = f"not a readable Parquet file ({text})"
        raise UnavailableError("data.root", path, reason, "fetch the file again") from error
