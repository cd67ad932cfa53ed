"""Parquet files as image hubs publish them: a row an image, encoded bytes and a class number."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tla_service.config import DataConfig
from tla_service.data.cache import files_key
from tla_service.data.encoded import build_splits
from tla_service.data.packed import PackedBlobs, pack
from tla_service.data.sources import Split, Splits
from tla_service.data.storage import required_root
from tla_service.errors import UnavailableError

if TYPE_CHECKING:
    import pyarrow

_TEST_NAMES = ("test", "validation", "valid", "val")
_IMAGE_NAMES = ("image", "img", "images", "png", "jpg")
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")
_FIX = "use the layout of image hubs: train-*.parquet and test-*.parquet, with image bytes and integer labels"
_BATCH = 512


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        image: Encoded bytes, or a struct with a field ``bytes`` of them.
        label: Class numbers.
        class_names: From the schema's metadata; empty when it has none.
    """

    image: str
    label: str
    class_names: tuple[str, ...]


def load_parquet(config: DataConfig) -> Splits:
    """Load ``train-*.parquet`` and ``test-*.parquet`` (or ``validation-*``), found anywhere under ``data.root``.

    Columns are found by type, and by the usual names where several fit. Rows keep their order, files go by name.
    Class names come from the schema's metadata (``huggingface`` or ``label_names``), else they are the numbers.
    Images of one size need no ``data.image_size``.

    Raises:
        ConfigError: If images differ in size and ``data.image_size`` is not set.
        UnavailableError: If files are missing, damaged, or hold something else.
    """
    root = required_root(config)
    found = find_splits(root)
    if found is None:
        raise UnavailableError("data.root", config.root, "no train-*.parquet and test-*.parquet there", _FIX)
    columns = {split: find_columns(_schema(files[0]), files[0]) for split, files in found.items()}
    packed = {split: _packed(config, files, columns[split]) for split, files in found.items()}
    labels = {split: labels for split, (_, labels) in packed.items()}
    highest = max(int(labels[split].max()) for split in labels)
    names = columns["train"].class_names or tuple(str(number) for number in range(highest + 1))
    if highest >= len(names):
        raise UnavailableError("data.root", root, f"label {highest}, but only {len(names)} class names", _FIX)
    key = files_key([*found["train"], *found["test"]], columns["train"].image)
    return build_splits(config, key, {split: blobs for split, (blobs, _) in packed.items()}, labels, names)


def find_splits(root: Path) -> dict[Split, list[Path]] | None:
    """Training and test files under a folder, each sorted by path; ``None`` if either is missing."""
    if not root.is_dir():
        return None
    train = _files(root, "train")
    test = next(filter(None, (_files(root, name) for name in _TEST_NAMES)), None)
    return {"train": train, "test": test} if train and test else None


def _files(root: Path, name: str) -> list[Path]:
    found = [*root.rglob(f"{name}-*.parquet"), *root.rglob(f"{name}.parquet")]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))


def _schema(path: Path) -> "pyarrow.Schema":
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as opened:
            return opened.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UnavailableError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UnavailableError("data.root", path, f"not a readable Parquet file ({text})", "fetch the file again")


def find_columns(schema: "pyarrow.Schema", path: Path) -> Columns:
    """Find the image and the label column by type.

    Args:
        schema: The file's schema.
        path: The file, for the message.

    Raises:
        UnavailableError: If there is no such column.
    """
    from pyarrow import types

    def is_bytes(kind: "pyarrow.DataType") -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_image(kind: "pyarrow.DataType") -> bool:
        return is_bytes(kind) or (
            types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
        )

    image = _preferred([field.name for field in schema if is_image(field.type)], _IMAGE_NAMES)
    label = _preferred([field.name for field in schema if types.is_integer(field.type)], _LABEL_NAMES)
    if image is None or label is None:
        wanted = "image bytes" if image is None else "integer labels"
        reason = f"no column of {wanted} among {', '.join(schema.names) or 'none'}"
        raise UnavailableError("data.root", path, reason, _FIX)
    return Columns(image, label, _class_names(schema.metadata or {}, label))


def _preferred(found: list[str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in found), found[0] if found else None)


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Class names from a schema's metadata; what cannot be read there counts as absent."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        if isinstance(names, list) and names:
            return tuple(map(str, names))
    except (KeyError, ValueError, TypeError, RecursionError):
        pass
    text = metadata.get(b"label_names", b"").decode("utf-8", errors="replace")
    return tuple(name.strip() for name in text.split(",")) if text.strip() else ()


def _packed(config: DataConfig, files: list[Path], columns: Columns) -> tuple[PackedBlobs, torch.Tensor]:
    import pyarrow
    from pyarrow import parquet

    origins, first = [], 0
    for path in files:
        try:
            rows = parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        origins.append((str(path), first))
        first += rows
    if first == 0:
        raise UnavailableError("data.root", files[0], "holds no rows", _FIX)

    def all_rows() -> Iterator[tuple[bytes, int]]:
        for path in files:
            yield from read_rows(path, columns)

    return pack(config.cache_dir, files_key(files, columns.image, columns.label), all_rows, origins)


def read_rows(path: Path, columns: Columns) -> Iterator[tuple[bytes, int]]:
    """Encoded images and labels of one file, in order.

    Raises:
        UnavailableError: If the file is damaged, differs in its columns, or a row has no image or no label.
    """
    import pyarrow
    from pyarrow import compute, parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as opened:
            for batch in opened.iter_batches(_BATCH, columns=[columns.image, columns.label]):
                images, labels = batch.column(columns.image), batch.column(columns.label)
                if pyarrow.types.is_struct(images.type):
                    # Unlike field(), this passes the struct's own nulls on.
                    images = compute.struct_field(images, "bytes")
                for blob, label in zip(images.to_pylist(), labels.to_pylist(), strict=True):
                    if not isinstance(blob, bytes) or not isinstance(label, int) or not 0 <= label < 2**31:
                        what = "no image bytes" if not isinstance(blob, bytes) else f"no usable label ({label})"
                        raise UnavailableError("data.root", f"{path}, row {row}", what, _FIX)
                    yield blob, label
                    row += 1
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise _damaged(path, error) from error
