"""Parquet files in the layout of image hubs: one row per image, with encoded bytes and a label."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from pathlib import Path

import torch

from tla_service.config import DataConfig
from tla_service.data.cache import MAKE_ROOM, cache_folder, cached_tensors, disk_trouble, files_key
from tla_service.data.parquet_files import (
    Shard,
    find_image_column,
    find_label_columns,
    find_splits,
    no_label_column,
    open_shards,
    read_column,
    unlike_first,
)
from tla_service.data.parquet_labels import Labels, number_classes, read_labels
from tla_service.data.roots import required_root
from tla_service.data.sources import ImageSource, Splits, build_splits
from tla_service.data.trees import HOLD_OUT, MOST_BYTES, NO_TEST, FolderTree, choose_splits, listed, notice
from tla_service.errors import UnavailableError
from tla_service.files import remove_parts, whole_file

LOG = logging.getLogger(__name__)
COLUMNS = ("label_column", "image_column")  # the settings that name them
_FIX = "use train-*.parquet and test-*.parquet (or validation-*), or name the files by data.train and data.test"
_BATCH = 512


def load_parquet(config: DataConfig) -> Splits:
    """Load ``train-*.parquet`` and ``test-*.parquet`` (or ``validation-*``), found anywhere under ``data.root``.

    The label column has a usual name, or is given by ``data.label_column``; the image column is the only one with
    encoded images, has a usual name, or is given by ``data.image_column``. Rows keep their order, files are sorted by
    name. Splits have these names, or those that ``data.train``, ``data.validation`` and ``data.test`` give. If the test
    files have no labels, labeled validation files are used for testing.
    """
    root = required_root(config)
    if not root.is_dir():
        remedy = "unpack it, or give the folder of train-*.parquet"
        raise UnavailableError("data.root", config.root, "is a file, not a folder of Parquet files", remedy)
    found = find_splits(root, config)
    train_name, tests, validations = choose_splits(config, found)
    if train_name not in found:
        reason = "no train-*.parquet there" + (f", but {listed(sorted(found))}" if found else "")
        raise UnavailableError("data.root", config.root, reason, _FIX)
    if not tests and config.test_fraction is None:
        reason = f"has {train_name}-*.parquet but no test-*.parquet (or validation-*)"
        raise UnavailableError("data.root", config.root, reason, NO_TEST)
    shards = open_shards(found[train_name], root, config.root)
    train = _labels(config, shards)
    if train is None:
        raise no_label_column(shards[0].schema, str(shards[0].path), config.label_column)
    splits, taken = {"train": train}, ""
    for role, possible in (("test", tests), ("validation", validations)):
        name, labels = _labelled(config, root, {name: found[name] for name in possible if name != taken})
        if labels is not None:
            splits[role], taken = labels, name
            if role == "test" and name != possible[0]:
                notice("%s has no labels; testing on the %s files", found[possible[0]][0], name)
        elif possible and (role == "test" or config.validation):
            nor = "".join(f", and neither have the {name} files" for name in possible[1:])
            remedy = "add labels in a column named as in the training files, or labelled validation-*.parquet files"
            remedy += f", or {HOLD_OUT}" if role == "test" else ""
            raise UnavailableError("data.root", found[possible[0]][0], f"has no labels{nor}", remedy)
    images = [_image_column(config, labels.shards) for labels in splits.values()]
    names, classes = number_classes(*splits.values())
    used = [shard.path for labels in splits.values() for shard in labels.shards]
    unused = [path.relative_to(root).as_posix() for files in found.values() for path in files if path not in used]
    if unused:
        notice("data.root=%s: files left out: %s", config.root, listed(unused))
    blobs = [_packed(config.cache_dir, labels, image) for labels, image in zip(splits.values(), images, strict=True)]
    parts = dict(zip(splits, zip(blobs, classes, strict=True), strict=True))
    return build_splits(config, files_key(used, images[0]), parts, names)


def load_unsplit(
    config: DataConfig, path: Path, class_names: tuple[str, ...], *, colour: bool
) -> tuple[ImageSource, Callable[[int], str]]:
    """One Parquet file, or all below a folder, as one set; and the file and row of an image.

    Labels are names of these classes, or else their numbers from 0. Columns and errors as `load_parquet`.
    """
    root = path if path.is_dir() else path.parent
    files = [path] if path != root else [root / name for name in FolderTree(root).names if name.endswith(".parquet")]
    if not files:
        raise UnavailableError("data.root", path, "holds no .parquet files", "give their folder, or one npz file")
    shards = open_shards(files, root, str(path))
    labels = _labels(config, shards)
    if labels is None:
        raise no_label_column(shards[0].schema, str(files[0]), config.label_column)
    names, (classes,) = number_classes(labels, checked=False)
    known = class_names if {*names} <= {*class_names} else [*map(str, range(len(class_names)))]
    numbers = torch.tensor([known.index(name) if name in known else len(known) for name in names])
    image = _image_column(config, shards)
    parts = {"train": (blobs := _packed(config.cache_dir, labels, image), numbers[classes])}
    return build_splits(config, files_key(files, image), parts, class_names, colour=colour).train, blobs.name


def _labels(config: DataConfig, shards: list[Shard]) -> Labels | None:
    """The labels of a split, or ``None`` if it has no column of them."""
    columns = find_label_columns(shards[0].schema, config.label_column)
    if len(columns) > 1:
        text = "%s: labels are read from column %r, not from %s; data.label_column chooses another"
        notice(text, shards[0].path, columns[0], listed(columns[1:]))
    return read_labels(shards, columns[0]) if columns else None


def _labelled(config: DataConfig, root: Path, splits: dict[str, list[Path]]) -> tuple[str, Labels | None]:
    """The first split that has labels, if any, and these: published test sets often have none."""
    for name, files in splits.items():
        labels = _labels(config, open_shards(files, root, config.root))
        if labels is not None and not labels.all_missing:
            return name, labels
    return "", None


def _image_column(config: DataConfig, shards: list[Shard]) -> str:
    column = find_image_column(shards[0].schema, str(shards[0].path), config.image_column)
    for shard in shards:
        if column not in shard.schema.names:
            raise unlike_first(shard, shards[0], repr(column))
    return column


class _PackedBlobs:
    """Encoded images in one file of the cache, at ``offsets`` (N + 1,), from the rows of shards; a ``Blobs``."""

    def __init__(self, path: Path, offsets: torch.Tensor, digest: bytes, shards: list[Shard]) -> None:
        self._path, self._offsets, self._digest = path, offsets, digest
        self._files = [shard.path for shard in shards]
        self._first_rows = list(accumulate((shard.rows for shard in shards), initial=0))[:-1]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, row: int) -> bytes:
        """The encoded image; UnavailableError if the cache was removed or truncated meanwhile."""
        start, end = self._offsets[row : row + 2].tolist()
        remedy = "start again: the file is then packed again"
        # Opened anew, so that threads and forked loaders share no file position.
        with disk_trouble("data.cache_dir", self._path, remedy), self._path.open("rb", buffering=0) as handle:
            handle.seek(start)
            blob = handle.read(end - start)
        if len(blob) != end - start:
            raise UnavailableError("data.cache_dir", self._path, "is truncated", "remove it and start again")
        return blob

    def name(self, row: int) -> str:
        """The original file and the row in it."""
        file = bisect_right(self._first_rows, row) - 1
        return f"{self._files[file]}, row {row - self._first_rows[file]}"

    def stamp(self) -> str:
        """Covers every byte and offset."""
        return hashlib.sha256(self._digest.hex().encode() + self._offsets.numpy().tobytes()).hexdigest()


def _packed(cache_dir: str, labels: Labels, image: str) -> _PackedBlobs:
    """Concatenate the images of a split, once per node."""
    files = [shard.path for shard in labels.shards]
    key = files_key(files, image, labels.column)  # the label column only for older caches
    path = cache_folder(cache_dir, "packed") / f"{key}.blobs"

    def build() -> dict[str, torch.Tensor]:
        offsets, digest = [0], hashlib.sha256()
        with disk_trouble("data.cache_dir", path, MAKE_ROOM):
            remove_parts(path.parent, path.name)  # the index's lock is held
            with whole_file(path) as part, part.open("wb") as handle:
                for blob in chain.from_iterable(_read_images(file, image) for file in files):
                    handle.write(blob)
                    digest.update(blob)
                    offsets.append(offsets[-1] + len(blob))
        return {"offsets": torch.tensor(offsets), "digest": torch.tensor(list(digest.digest()), dtype=torch.uint8)}

    index = cached_tensors(cache_dir, f"{key}-index", build)[0]
    if not path.is_file() or path.stat().st_size != int(index["offsets"][-1]):
        LOG.warning("packing %s again: it is missing or truncated", path)
        (cache_folder(cache_dir, "decoded") / f"{key}-index.safetensors").unlink(missing_ok=True)
        index = cached_tensors(cache_dir, f"{key}-index", build)[0]
    return _PackedBlobs(path, index["offsets"], bytes(index["digest"].tolist()), labels.shards)


def _read_images(path: Path, column: str) -> Iterator[bytes]:
    """Encoded images of one file, in order; UnavailableError if it is damaged, or a row has no image."""
    from pyarrow import compute, types

    arrays = read_column(path, column, _BATCH)
    # Unlike field(), struct_field propagates the struct's own nulls.
    parts = (compute.struct_field(each, "bytes") if types.is_struct(each.type) else each for each in arrays)
    for row, blob in enumerate(chain.from_iterable(part.to_pylist() for part in parts)):
        if blob is None:
            remedy = "put the encoded image into the row, or leave it out"
            raise UnavailableError("data.root", f"{path}, row {row}", "no image bytes", remedy)
        if len(blob) > MOST_BYTES:
            reason = f"has {len(blob)} bytes, more than the {MOST_BYTES} of the largest image that is read"
            raise UnavailableError("data.root", f"{path}, row {row}", reason, "leave the row out")
        yield blob
