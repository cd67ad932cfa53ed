"""Parquet files in the layout of image hubs: one row per image, with encoded bytes and a label."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from tla_service.config import DataConfig
from tla_service.data.cache import files_key
from tla_service.data.decoding import Blobs
from tla_service.data.encoded import build_splits
from tla_service.data.members import TEST_SPLITS, listed, notice
from tla_service.data.packed import PackedBlobs, pack
from tla_service.data.parquet_files import (
    Shard,
    find_image_column,
    find_label_columns,
    find_splits,
    no_label_column,
    open_shards,
    read_column,
)
from tla_service.data.parquet_labels import Labels, number_classes, read_labels
from tla_service.data.roots import required_root
from tla_service.data.sources import Split, Splits
from tla_service.errors import ConfigError, UnavailableError

_FIX = "use the layout of image hubs: train-*.parquet and test-*.parquet (or validation-*) in one folder"
_BATCH = 512


def load_parquet(config: DataConfig) -> Splits:
    """Load ``train-*.parquet`` and ``test-*.parquet`` (or ``validation-*``), found anywhere under ``data.root``.

    The label column has a usual name, or is given by ``data.label_column``; the image column is the only one with
    encoded images, has a usual name, or is given by ``data.image_column``. Rows keep their order, files are sorted by
    name. If the test files have no labels, labeled validation files are used for testing. Images of one size need no
    ``data.image_size``.

    Raises:
        ConfigError: If columns are not found, the root holds several data sets, or images differ in size and
            ``data.image_size`` is not set.
        UnavailableError: If files are missing, damaged, differ from each other, or hold no usable labels.
    """
    root = required_root(config)
    if not root.is_dir():
        remedy = "unpack it, or give the folder of train-*.parquet"
        raise UnavailableError("data.root", config.root, "is a file, not a folder of Parquet files", remedy)
    found = find_splits(root)
    if found is None:
        raise UnavailableError("data.root", config.root, "no train-*.parquet and test-*.parquet there", _FIX)
    shards = open_shards(found["train"], root, config.root)
    train = _labels(config, shards)
    if train is None:
        raise no_label_column(shards[0].schema, str(shards[0].path), config.label_column)
    test = _labelled_test(config, root, found)
    images = [_image_column(config, labels.shards) for labels in (train, test)]
    names, train_classes, test_classes = number_classes(train, test)
    used = [shard.path for shard in [*train.shards, *test.shards]]
    unused = [path.relative_to(root).as_posix() for files in found.values() for path in files if path not in used]
    if unused:
        notice("data.root=%s: files left out: %s", config.root, listed(unused))
    key = files_key(used, images[0])
    blobs: dict[Split, Blobs] = {"train": _packed(config, train, images[0]), "test": _packed(config, test, images[1])}
    return build_splits(config, key, blobs, {"train": train_classes, "test": test_classes}, names)


def _labels(config: DataConfig, shards: list[Shard]) -> Labels | None:
    """The labels of a split, or ``None`` if it has no column of them."""
    columns = find_label_columns(shards[0].schema, config.label_column)
    if len(columns) > 1:
        text = "%s: labels are read from column %r, not from %s; data.label_column chooses another"
        notice(text, shards[0].path, columns[0], listed(columns[1:]))
    return read_labels(shards, columns[0]) if columns else None


def _labelled_test(config: DataConfig, root: Path, found: dict[str, list[Path]]) -> Labels:
    """Labels of the first test split that has any: published test sets often have none."""
    splits = [name for name in TEST_SPLITS if name in found]
    for name in splits:
        labels = _labels(config, open_shards(found[name], root, config.root))
        if labels is not None and not labels.all_missing:
            if name != splits[0]:
                text = "%s has no labels; testing on the %s files (validation uses part of the training images)"
                notice(text, found[splits[0]][0], name)
            return labels
    nor = "".join(f", and neither have the {name} files" for name in splits[1:])
    remedy = "add labels in a column named as in the training files, or labelled validation-*.parquet files"
    raise UnavailableError("data.root", found[splits[0]][0], f"has no labels{nor}", remedy)


def _image_column(config: DataConfig, shards: list[Shard]) -> str:
    column = find_image_column(shards[0].schema, str(shards[0].path), config.image_column)
    for shard in shards:
        if column not in shard.schema.names:
            reason = f"has no column {column!r}, unlike {shards[0].path.name}"
            raise UnavailableError("data.root", shard.path, reason, "fetch the file again, or leave it out")
    return column


def _packed(config: DataConfig, labels: Labels, image: str) -> PackedBlobs:
    files = [shard.path for shard in labels.shards]
    first_rows = accumulate((shard.rows for shard in labels.shards), initial=0)
    origins = list(zip(map(str, files), first_rows, strict=False))

    def all_images() -> Iterator[bytes]:
        for path in files:
            yield from read_images(path, image)

    # The label column is in the key only for older caches.
    return pack(config.cache_dir, files_key(files, image, labels.column), all_images, origins)


def refuse_columns(config: DataConfig, reason: str) -> None:
    """Raise ConfigError if ``data.label_column`` or ``data.image_column`` is set."""
    for name in ("label_column", "image_column"):
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(f"data.{name}", value, reason, "leave it out, or set data.name=parquet")


def read_images(path: Path, column: str) -> Iterator[bytes]:
    """Encoded images of one file, in order; UnavailableError if it is damaged, or a row has no image."""
    from pyarrow import compute, types

    row = 0
    for images in read_column(path, column, _BATCH):
        # Unlike field(), this propagates the struct's own nulls.
        blobs = compute.struct_field(images, "bytes") if types.is_struct(images.type) else images
        for blob in blobs.to_pylist():
            if blob is None:
                remedy = "put the encoded image into the row, or leave it out"
                raise UnavailableError("data.root", f"{path}, row {row}", "no image bytes", remedy)
            yield blob
            row += 1
