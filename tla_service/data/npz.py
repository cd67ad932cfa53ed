"""Images and labels of an npz file, in the layout of published synthetic sets; nothing is unpickled."""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy

from tla_service.data.cache import disk_trouble
from tla_service.data.parquet_labels import UNLABELED
from tla_service.errors import ConfigError, UnavailableError, one_line

FIELD = "data.extra.path"
_IMAGES, _LABELS = ("image", "images"), ("label", "labels")
_LAYOUT = "save uint8 images (N, H, W, C) as image and integer classes (N,) as label with numpy.savez"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MOST_EXPANSION = 100  # deflate reaches 1,000, but on no images
_CHUNK = 1024
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def read_npz(path: Path, image_shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W), uint8, of shape ``image_shape``, and their labels (N,), int64, of any value.

    The file has ``image`` (N, H, W, C), or (N, H, W) if C is 1, and ``label`` (N,). Types and sizes are checked before
    anything of their size is allocated. ConfigError if they do not fit, UnavailableError if the file is damaged.
    """
    channels, height, width = image_shape
    with _opened(path) as archive:
        arrays = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        image, label = (next((arrays[key] for key in keys if key in arrays), None) for keys in (_IMAGES, _LABELS))
        if image is None:
            raise ConfigError(FIELD, path, f"has no array image, only {sorted(arrays)[:5]}", _LAYOUT)
        if label is None:
            raise ConfigError(FIELD, path, *UNLABELED)
        with _array(archive, label, path) as (stream, shape, kind):
            if kind.kind not in "iu" or len(shape) != 1 or not shape[0]:
                raise ConfigError(FIELD, path, f"its labels are {shape}, {kind}", _LAYOUT)
            labels = np.frombuffer(_read(stream, shape[0] * kind.itemsize), kind).astype(np.int64)
        with _array(archive, image, path) as (stream, shape, kind):
            fitting = [(height, width, channels), *([(height, width)] if channels == 1 else [])]
            if kind != np.uint8 or shape[1:] not in fitting or shape[0] != len(labels):
                wanted = f"the data set needs {(len(labels), *fitting[0])}, uint8, for {len(labels)} labels"
                raise ConfigError(FIELD, path, f"its images are {shape}, {kind}; {wanted}", _LAYOUT)
            images = torch.empty((len(labels), *image_shape), dtype=torch.uint8)
            for some in images.split(_CHUNK):
                pixels = np.frombuffer(_read(stream, some.numel()), np.uint8)
                some.numpy()[:] = pixels.reshape(len(some), height, width, channels).transpose(0, 3, 1, 2)
    return images, torch.from_numpy(labels)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    remedy = "fetch the file again"
    with disk_trouble(FIELD, path, remedy):
        try:
            with zipfile.ZipFile(path) as archive:
                yield archive
        except _ZIP_ERRORS as error:
            raise UnavailableError(FIELD, path, f"not a readable npz file ({one_line(error)})", remedy) from error


@contextlib.contextmanager
def _array(
    archive: zipfile.ZipFile, name: str, path: Path
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """An array's stream, at its first value, its shape and its type, in C order and of the size that they say."""
    info = archive.getinfo(name)
    if info.file_size > _MOST_EXPANSION * info.compress_size:
        reason = f"{name} claims to expand {info.file_size / max(1, info.compress_size):.0f}-fold, which no images do"
        raise ConfigError(FIELD, path, reason, "save it with numpy.savez, without compression")
    with archive.open(info) as stream:
        try:
            shape, by_column, kind = _HEADERS[npy.read_magic(stream)](stream)
        except _ZIP_ERRORS:
            raise
        except Exception as error:  # NumPy's parser raises errors of many kinds
            reason = f"{name} is not a readable array ({one_line(error)})"
            raise UnavailableError(FIELD, path, reason, "save it again with numpy.savez") from error
        if kind.hasobject:
            raise ConfigError(FIELD, path, f"{name} holds Python objects, which are not read", _LAYOUT)
        if by_column and len(shape) > 1:
            raise ConfigError(FIELD, path, f"{name} is in Fortran order", "save numpy.ascontiguousarray of it")
        if min(shape, default=0) < 0 or stream.tell() + math.prod(shape) * kind.itemsize != info.file_size:
            raise UnavailableError(FIELD, path, f"{name} has not the size of {shape}, {kind}", "fetch the file again")
        yield stream, shape, kind


def _read(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise EOFError("it ends early")
    return content
