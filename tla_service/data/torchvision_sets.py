"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 as torchvision stores them.

torchvision takes seconds to import, so it is imported only when needed: not for MNIST files that are present.
"""

import gzip
import shutil
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tla_service.config import DataConfig
from tla_service.data.cache import cache_folder, disk_trouble, files_key, locked
from tla_service.data.decoding import resized
from tla_service.data.parquet import load_parquet, refuse_columns
from tla_service.data.parquet_files import find_splits
from tla_service.data.roots import required_root
from tla_service.data.sources import ArraySource, Splits
from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import write_whole

_DIGITS = tuple(map(str, range(10)))
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_IDX_SETS = {"mnist": ("MNIST", _DIGITS), "fashion_mnist": ("FashionMNIST", _CLOTHES)}
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# torchvision's class and its paths below a root, known without importing it.
_CIFAR_SETS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
}
_AGAIN = "fetch the file again"
_DISK_FIX = "free some space, or give another folder"
_FETCH_FIX = "check the network and the folder, or put the files there yourself"


def load_mnist(config: DataConfig) -> Splits:
    """Load MNIST or Fashion-MNIST into memory.

    ``data.root`` is torchvision's root, with ``MNIST/raw/*`` in it; the ``.gz`` files are enough: they are unpacked
    into the cache, never beside the files. Otherwise, ``train-*.parquet`` files under the root are read. With
    ``data.download`` the set is fetched into the root first.

    Raises:
        ConfigError: If ``data.download`` is set for an s3:// root.
        UnavailableError: If the set is missing, damaged, or cannot be fetched.
    """
    root = _root(config)
    folder_name, class_names = _IDX_SETS[config.name]
    folder = _idx_folder(root, folder_name, config.cache_dir)
    if folder is None and (splits := _from_parquet(config, root, channels=1)) is not None:
        return splits
    refuse_columns(config, "data.root is not read as Parquet files")
    if folder is None and config.download:
        _download(root, folder_name, config.cache_dir)
        folder = _idx_folder(root, folder_name, config.cache_dir)
    if folder is None:
        raise _missing(config, root / folder_name / "raw" / _IDX_FILES[0])
    arrays = [read_idx(folder / name) for name in _IDX_FILES]
    train = _source(arrays[0][:, None], arrays[1], config)
    return Splits(train, _source(arrays[2][:, None], arrays[3], config), class_names)


def load_cifar(config: DataConfig) -> Splits:
    """Load CIFAR-10 or CIFAR-100 into memory; torchvision checks every file's MD5 before it unpickles it.

    ``data.root`` is torchvision's root, with ``cifar-10-batches-py`` or ``cifar-10-python.tar.gz`` in it; otherwise as
    `load_mnist`.
    """
    root = _root(config)
    kind_name, *own = _CIFAR_SETS[config.name]
    there = any((root / name).exists() for name in own)
    if not there and (splits := _from_parquet(config, root, channels=3)) is not None:
        return splits
    refuse_columns(config, "data.root is not read as Parquet files")
    from torchvision import datasets

    kind = getattr(datasets, kind_name)
    ready, missing = _batches_root(root, kind, config.cache_dir)
    if missing and config.download:
        _download(root, kind.__name__, config.cache_dir)
        ready, missing = _batches_root(root, kind, config.cache_dir)
    if missing:
        raise _missing(config, missing[0])
    train, test = (_read_batches(kind, ready, config, train=train) for train in (True, False))
    return Splits(train[0], test[0], train[1])


def read_idx(path: Path) -> torch.Tensor:
    """Read a file in MNIST's own format: an array, uint8, of the shape in its header.

    Raises:
        UnavailableError: If it is missing, or does not match its header.
    """
    with disk_trouble("data.root", path, _AGAIN):
        content = path.read_bytes()
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[place : place + 4]) for place in range(4, start, 4)]
    wanted = start + int(np.prod(shape, dtype=object))
    if not 1 <= dimensions <= 4 or len(content) != wanted:
        reason = "damaged: not an array of bytes" if not dimensions else f"damaged: {len(content)} bytes, not {wanted}"
        raise UnavailableError("data.root", path, reason, _AGAIN)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _root(config: DataConfig) -> Path:
    if config.download and (config.root or "").startswith("s3://"):
        raise ConfigError("data.download", True, "an s3:// root is only read", "upload the set, or give a local root")
    return required_root(config)


def _from_parquet(config: DataConfig, root: Path, channels: int) -> Splits | None:
    """The set from Parquet files, if the root has some."""
    if find_splits(root) is None:
        return None
    splits = load_parquet(config)
    if splits.train.image_shape[0] != channels:
        # The root may hold another set, since files are found at any depth.
        reason = f"its Parquet files hold {splits.train.image_shape[0]}-channel images, {config.name} has {channels}"
        raise ConfigError("data.root", config.root, reason, "point it at this set's folder, or set data.name=parquet")
    return splits


def _missing(config: DataConfig, path: Path) -> UnavailableError:
    remedy = "give torchvision's root folder, or set data.download=true"
    return UnavailableError("data.root", config.root, f"no {config.name} there: {path} is missing", remedy)


def _source(images: torch.Tensor, labels: torch.Tensor, config: DataConfig) -> ArraySource:
    if images.dim() != 4 or labels.dim() != 1 or len(images) != len(labels):
        reason = f"images of shape {tuple(images.shape)} do not match labels of shape {tuple(labels.shape)}"
        raise UnavailableError("data.root", config.root, reason, _AGAIN)
    return ArraySource(images if config.image_size is None else resized(images, config.image_size), labels)


def _idx_folder(root: Path, folder_name: str, cache_dir: str) -> Path | None:
    """The folder that holds the four unpacked files, unpacking them into the cache if need be."""
    raw = root / folder_name / "raw"
    for folder in (raw, root / "raw", root):
        if all((folder / name).is_file() for name in _IDX_FILES):
            return folder
        packed = [folder / f"{name}.gz" for name in _IDX_FILES]
        if all(path.is_file() for path in packed):
            return _unpacked(packed, cache_dir, _gunzip)
    return None


def _unpacked(archives: list[Path], cache_dir: str, unpack: Callable[[Path, Path], None]) -> Path:
    """A folder of the cache with the content of archives, unpacked once per node."""
    folder = cache_folder(cache_dir, "unpacked", files_key(archives))
    with locked(folder / "lock"), disk_trouble("data.cache_dir", folder, _DISK_FIX):
        for archive in archives if not (folder / "done").exists() else ():
            try:
                unpack(archive, folder)
            except (gzip.BadGzipFile, tarfile.TarError, EOFError, zlib.error) as error:
                raise UnavailableError("data.root", archive, f"damaged ({error})", _AGAIN) from error
        write_whole(folder / "done", "")
    return folder


def _gunzip(archive: Path, folder: Path) -> None:
    with gzip.open(archive, "rb") as source, (folder / archive.stem).open("wb") as sink:
        shutil.copyfileobj(source, sink, 2**20)


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


def _batches_root(root: Path, kind: Any, cache_dir: str) -> tuple[Path, list[Path]]:
    """A root that holds the unpacked files of CIFAR, and which are missing there."""
    names = [f"{kind.base_folder}/{name}" for name, _ in kind.train_list + kind.test_list]
    names.append(f"{kind.base_folder}/{kind.meta['filename']}")
    missing = [root / name for name in names if not (root / name).is_file()]
    archive = root / kind.filename
    if not missing or not archive.is_file():
        return root, missing
    ready = _unpacked([archive], cache_dir, _untar)
    return ready, [ready / name for name in names if not (ready / name).is_file()]


def _read_batches(kind: Any, root: Path, config: DataConfig, *, train: bool) -> tuple[ArraySource, tuple[str, ...]]:
    with disk_trouble("data.root", root, _AGAIN), warnings.catch_warnings():
        # Today's NumPy warns about the dtypes of these old pickles.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        try:
            loaded = kind(root, train=train)
        except (RuntimeError, ValueError, EOFError, KeyError) as error:
            raise UnavailableError("data.root", root / kind.base_folder, f"damaged ({error})", _AGAIN) from error
    images = torch.from_numpy(np.ascontiguousarray(loaded.data.transpose(0, 3, 1, 2)))
    return _source(images, torch.tensor(loaded.targets), config), tuple(loaded.classes)


def _download(root: Path, kind_name: str, cache_dir: str) -> None:
    from torchvision import datasets

    # One process per node fetches; the others find the files.
    with locked(cache_folder(cache_dir, "downloads") / f"{kind_name}.lock"):
        try:
            with disk_trouble("data.root", root, _FETCH_FIX):
                getattr(datasets, kind_name)(root, train=True, download=True)
        except RuntimeError as error:
            lines = str(error).splitlines() or [repr(error)]
            raise UnavailableError("data.root", root, f"cannot fetch {kind_name} ({lines[-1]})", _FETCH_FIX) from error
