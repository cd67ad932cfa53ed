"""Parquet files of a data set, and which of their columns hold images and labels: found by name, never guessed."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tla_service.config import DataConfig
from tla_service.data.trees import MOST_BYTES, TEST_SPLITS, FolderTree, notice, refuse_several
from tla_service.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

# In order of preference; compared without case.
IMAGE_NAMES = ("image", "img", "images", "png", "jpg")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")
_LABEL_KINDS = {"string": "text", "large_string": "text", "string_view": "text", "bool": "booleans"}
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


@dataclass(frozen=True)
class Shard:
    """One file of a split, with its number of rows and its schema."""

    path: Path
    rows: int
    schema: "pyarrow.Schema"


def find_splits(root: Path, config: DataConfig) -> dict[str, list[Path]]:
    """Files below a folder by split, sorted: ``train-*.parquet``, or else all in folders ``train``; others by name."""
    named = [config.train or "train", *TEST_SPLITS, *filter(None, (config.validation, config.test))]
    pattern = re.compile(rf"({'|'.join(map(re.escape, sorted(named, key=len, reverse=True)))})(-.*)?")
    names = FolderTree(root).names if root.is_dir() else []
    paths = sorted(path for name in names if (path := PurePosixPath(name)).suffix == ".parquet")
    matches = {path: match[1] for path in paths if (match := pattern.fullmatch(path.stem))}
    in_folders = {*named} - {*matches.values()}
    found: dict[str, list[Path]] = {}
    for path in paths:
        is_number = path.stem[:1].isdigit() and path.parent.name  # in folders named like their split
        other = path.parent.name if path.parent.name in in_folders or is_number else _NUMBERED.sub("", path.name)
        found.setdefault(matches.get(path, other.removesuffix(".parquet")), []).append(root / path)
    return found


def open_shards(files: list[Path], root: Path, shown_root: str | None) -> list[Shard]:
    """Rows and schemas of a split's files; ConfigError if they are in several folders, and so of several data sets."""
    refuse_several(shown_root, [path.parent.relative_to(root).as_posix() for path in files])
    numbered = [match for path in files if (match := _NUMBERED.search(path.name))]
    for total in sorted({match[2] for match in numbered}):
        there = len({match[1] for match in numbered if match[2] == total})
        if there < int(total):
            notice("%s: only %d of %d files are there", files[0], there, int(total))
    shards = []
    for path in files:
        with _opened(path) as opened:
            shards.append(Shard(path, opened.metadata.num_rows, opened.schema_arrow))
        twice = next((name for name, count in Counter(shards[-1].schema.names).items() if count > 1), None)
        if twice is not None:
            reason = f"has several columns named {twice!r}"
            raise UnavailableError("data.root", path, reason, "write the file again with names of their own")
    if not any(shard.rows for shard in shards):
        remedy = "fetch the file again, or point data.root at another copy"
        raise UnavailableError("data.root", files[0], "holds no rows", remedy)
    return shards


def unlike_first(shard: Shard, first: Shard, column: str) -> UnavailableError:
    """The error for a file without a column that the first one has."""
    reason = f"has no column {column}, unlike {first.path.name}"
    return UnavailableError("data.root", shard.path, reason, "fetch the file again, or leave it out")


def read_column(path: Path, column: str, batch: int) -> Iterator["pyarrow.Array"]:
    """One column of a file, in arrays of up to ``batch`` rows; UnavailableError if the file is damaged."""
    with _opened(path) as opened:
        whole, found = opened.metadata, 0
        groups = (whole.row_group(number) for number in range(whole.num_row_groups))
        chunks = (group.column(place) for group in groups for place in range(whole.num_columns))
        # A dictionary's values repeat at no cost in the file, but each row of a batch is as large as its value.
        sizes = (chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
        most = MOST_BYTES // max([1, *sizes])
        for rows in opened.iter_batches(max(1, min(batch, most)), columns=[column]):
            found += rows.num_rows
            yield rows.column(column)
        if found != whole.num_rows:
            raise OSError(f"{found} rows, not {whole.num_rows}")


def find_image_column(schema: "pyarrow.Schema", shown: str, wanted: str | None) -> str:
    """The column of encoded images: the one wanted, the only one, or the one with a usual name."""
    fitting = [field.name for field in schema if _holds_images(field.type)]
    if wanted is not None:
        if wanted not in fitting:
            remedy = f"give one of {', '.join(fitting)}" if fitting else "give a column of encoded images"
            raise ConfigError("data.image_column", wanted, f"is no column of image bytes in {shown}", remedy)
        return wanted
    named = _known(fitting, IMAGE_NAMES)
    if named or len(fitting) == 1:
        return named[0] if named else fitting[0]
    if not fitting:
        reason = f"{shown} has no column of encoded images (bytes), but {_columns(schema)}"
        raise UnavailableError("data.root", None, reason, "store the images themselves, not their paths or pixels")
    reason = f"{shown} has several columns of image bytes, none named {_either(IMAGE_NAMES)}: {', '.join(fitting)}"
    raise ConfigError("data.image_column", None, reason, "set it to the column that holds the images")


def find_label_columns(schema: "pyarrow.Schema", wanted: str | None) -> list[str]:
    """The columns of possible labels that are ``wanted`` or else have a usual name, the preferred one first."""
    fitting = [field.name for field in schema if label_kind(field.type) is not None]
    return _known(fitting, LABEL_NAMES) if wanted is None else [name for name in fitting if name == wanted]


def no_label_column(schema: "pyarrow.Schema", shown: str, wanted: str | None) -> ConfigError:
    """The error for a file without a label column."""
    if wanted is None and not (named := _known(schema.names, LABEL_NAMES)):
        reason = f"{shown} has no column named {_either(LABEL_NAMES)}, but {_columns(schema)}"
        return ConfigError("data.label_column", None, reason, "set it to the column that holds the labels")
    wanted = named[0] if wanted is None else wanted
    if wanted in schema.names:
        reason = f"is {_short(schema.field(wanted).type)} in {shown}; labels are integers, text or booleans"
        return ConfigError("data.label_column", wanted, reason, "cast the column, or give another one")
    return ConfigError("data.label_column", wanted, f"is no column of {shown}", f"give one of {_columns(schema)}")


def label_kind(kind: "pyarrow.DataType") -> str | None:
    """Kind of labels in a column, dictionary-encoded or not: integers, text or booleans; else ``None``."""
    from pyarrow import types

    plain = kind.value_type if types.is_dictionary(kind) else kind
    return "integers" if types.is_integer(plain) else _LABEL_KINDS.get(str(plain))


def class_names(schema: "pyarrow.Schema", label: str) -> tuple[str, ...]:
    """Class names from a schema's metadata; empty if there are none that can be read."""
    metadata = schema.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        if isinstance(names, list) and names:
            return tuple(map(str, names))
    except (KeyError, ValueError, TypeError, RecursionError):
        pass
    text = metadata.get(b"label_names", b"").decode("utf-8", errors="replace")
    return tuple(name.strip() for name in text.split(",")) if text.strip() else ()


@contextlib.contextmanager
def _opened(path: Path) -> "Iterator[parquet.ParquetFile]":
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = f"not a readable Parquet file ({text})"
        raise UnavailableError("data.root", path, reason, "fetch the file again") from error


def _holds_images(kind: "pyarrow.DataType") -> bool:
    if _short(kind) == "struct" and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return str(kind) in ("binary", "large_binary", "binary_view")


def _known(found: list[str], names: tuple[str, ...]) -> list[str]:
    return [column for name in names for column in found if column.casefold() == name]


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _columns(schema: "pyarrow.Schema") -> str:
    return ", ".join(f"{field.name} ({_short(field.type)})" for field in schema) or "none"


def _short(kind: "pyarrow.DataType") -> str:
    return "struct" if str(kind).startswith("struct<") else str(kind)
