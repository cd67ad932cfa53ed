"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 as torchvision stores them.

torchvision takes seconds to import, so it is imported only when needed: not for MNIST files that are present.
"""

import gzip
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

from tla_service.config import DataConfig
from tla_service.data.cache import (
    MAKE_ROOM,
    cache_folder,
    cached_tensors,
    content_digest,
    disk_trouble,
    files_key,
    locked,
)
from tla_service.data.decoding import resized
from tla_service.data.parquet import COLUMNS, load_parquet
from tla_service.data.parquet_files import find_splits
from tla_service.data.roots import required_root
from tla_service.data.sources import ArraySource, Splits
from tla_service.data.trees import SPLITS, refuse_settings
from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import write_whole

_KINDS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CLASS_NAMES = {"mnist": tuple(map(str, range(10))), "fashion_mnist": _CLOTHES}
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# torchvision's archives and files below a root, known without importing it.
_CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
_CIFAR_FILES = {
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py", _CIFAR10_FILES),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python", ("train", "test", "meta")),
}
_MOST_BYTES = 250_000_000  # of an unpacked archive; CIFAR's is the largest, with 186 MB
_AGAIN = "fetch the file again"
_FETCH_FIX = "check the network and the folder, or put the files there yourself"


def load_torchvision_set(config: DataConfig) -> Splits:
    """Load a set into memory; torchvision checks every CIFAR file's MD5 before it unpickles it.

    ``data.root`` is torchvision's root, with ``MNIST/raw/*``, ``cifar-10-batches-py`` or ``cifar-10-python.tar.gz`` in
    it; archives are unpacked into the cache, never beside the files. Otherwise, ``train-*.parquet`` files under the
    root are read. With ``data.download`` the set is fetched into the root first.
    """
    if config.download and (config.root or "").startswith("s3://"):
        raise ConfigError("data.download", True, "an s3:// root is only read", "upload the set, or give a local root")
    is_idx = config.name in _CLASS_NAMES
    find = _find_idx if is_idx else _find_cifar
    root = required_root(config)
    folder, missing = find(root, config)
    if missing and (config.train or "train") in find_splits(root, config):
        refuse_settings(config, ("image_size",), "a registered model would not resize as its files are", "parquet")
        splits = load_parquet(config)
        if (there := splits.train.image_shape[0]) != (channels := 1 if is_idx else 3):
            # The root may hold another set, since files are found at any depth.
            reason = f"its Parquet files hold {there}-channel images, {config.name} has {channels}"
            remedy = "point it at this set's folder, or set data.name=parquet"
            raise ConfigError("data.root", config.root, reason, remedy)
        return splits
    refuse_settings(config, (*COLUMNS, *SPLITS), "data.root is not read as Parquet files", "parquet")
    if missing and config.download:
        _download(root, _KINDS[config.name], config.cache_dir)
        folder, missing = find(root, config)
    if missing:
        remedy = "give torchvision's root folder, or set data.download=true"
        raise UnavailableError("data.root", config.root, f"no {config.name} there: {missing} is missing", remedy)
    if is_idx:
        arrays = [read_idx(folder / name) for name in _IDX_FILES]
        train, test = (_source(arrays[place][:, None], arrays[place + 1], config) for place in (0, 2))
        return Splits(_CLASS_NAMES[config.name], train, test)
    return _read_cifar(folder, config)


def read_idx(path: Path) -> torch.Tensor:
    """Read a file in MNIST's own format: an array, uint8, of the shape in its header."""
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


def _source(images: torch.Tensor, labels: torch.Tensor, config: DataConfig) -> ArraySource:
    if images.dim() != 4 or labels.dim() != 1 or len(images) != len(labels):
        reason = f"images of shape {tuple(images.shape)} do not match labels of shape {tuple(labels.shape)}"
        raise UnavailableError("data.root", config.root, reason, _AGAIN)
    side = config.image_size
    if side is not None and images.shape[2:] != (side, side):
        key = f"{content_digest(images)[:24]}-{side}-{torch.__version__}"
        decoded, _ = cached_tensors(config.cache_dir, key, lambda: {"images": resized(images, side)})
        images = decoded["images"]
    return ArraySource(images, labels)


def _find_idx(root: Path, config: DataConfig) -> tuple[Path, Path | None]:
    """The folder of the four files, unpacked into the cache if need be, and the first that is missing."""
    folders = (root / _KINDS[config.name] / "raw", root / "raw", root)
    missing: list[Path] = []
    for folder in folders:
        plain = [folder / name for name in _IDX_FILES]
        paths = [path if path.is_file() else path.with_suffix(".gz") for path in plain]
        absent = [path for path in paths if not path.is_file()]
        if not absent:
            return (folder if paths == plain else _unpacked(paths, config.cache_dir)), None
        if not missing or len(absent) < len(missing):
            missing = absent
    return folders[0], missing[0]


def _find_cifar(root: Path, config: DataConfig) -> tuple[Path, Path | None]:
    """The root of the files, unpacked into the cache if need be, and the first that is missing."""
    archive, folder, files = _CIFAR_FILES[config.name]
    if not all((root / folder / name).is_file() for name in files) and (root / archive).is_file():
        root = _unpacked([root / archive], config.cache_dir)
    paths = (root / folder / name for name in files)
    return root, next((path for path in paths if not path.is_file()), None)


def _unpacked(archives: list[Path], cache_dir: str) -> Path:
    """A folder of the cache with the content of archives, unpacked once per node."""
    folder = cache_folder(cache_dir, "unpacked", files_key(archives))
    with locked(folder / "lock"), disk_trouble("data.cache_dir", folder, MAKE_ROOM):
        for archive in archives if not (folder / "done").exists() else ():
            with disk_trouble("data.root", archive, "let this user read it"):
                archive.open("rb").close()
            size = 0
            try:
                if archive.name.endswith(".tar.gz"):
                    with tarfile.open(archive) as opened:
                        for member in opened:
                            size += member.size
                            _check_size(size, archive)
                            opened.extract(member, folder, filter="data")
                else:
                    with (gzip.open if archive.suffix == ".gz" else open)(archive, "rb") as source:
                        content = source.read(_MOST_BYTES + 1)
                    _check_size(len(content), archive)
                    write_whole(folder / archive.stem, content)
            except (gzip.BadGzipFile, tarfile.TarError, EOFError, zlib.error) as error:
                raise UnavailableError("data.root", archive, f"damaged ({error})", _AGAIN) from error
        write_whole(folder / "done", "")
    return folder


def _check_size(size: int, archive: Path) -> None:
    if size > _MOST_BYTES:
        reason = f"unpacks to more than {_MOST_BYTES // 10**6} MB, unlike the data set"
        raise UnavailableError("data.root", archive, reason, _AGAIN)


def _read_cifar(root: Path, config: DataConfig) -> Splits:
    from torchvision import datasets

    kind = getattr(datasets, _KINDS[config.name])
    with disk_trouble("data.root", root, _AGAIN), warnings.catch_warnings():
        # Today's NumPy warns about the dtypes of these old pickles.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        try:
            loaded = [kind(root, train=train) for train in (True, False)]
        except (RuntimeError, ValueError, EOFError, KeyError) as error:
            raise UnavailableError("data.root", root / kind.base_folder, f"damaged ({error})", _AGAIN) from error
    train, test = (
        _source(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets), config)
        for part in loaded
    )
    return Splits(tuple(loaded[0].classes), train, test)


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
