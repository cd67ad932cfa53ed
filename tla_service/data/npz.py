"""Images and labels of an npz file, in the layout of published synthetic sets; nothing is unpickled."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from tla_service.errors import ConfigError, UnavailableError, UserError, one_line

_LAYOUT = "save uint8 images (N, H, W, C) as image and classes (N,) as label with numpy.savez"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MOST_EXPANSION = 100  # deflate reaches 1,000, but on no images


def read_npz(path: Path, image_shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Read ``images`` (N, C, H, W), uint8, of shape ``image_shape``, and ``labels`` (N,), int64, of any value.

    The file has ``image`` (N, H, W, C), or (N, H, W) if C is 1, and ``label`` (N,), or both in the plural. ConfigError
    if it does not, UnavailableError if it is damaged.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            return _checked(arrays, path, image_shape)
    except UserError:
        raise
    except Exception as error:  # of many kinds
        reason = f"not a readable npz file ({one_line(error)})"
        raise UnavailableError("data.root", path, reason, "fetch the file again") from error


def _checked(arrays: Any, path: Path, image_shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    channels, height, width = image_shape
    image, label = (next((each for each in (name, f"{name}s") if each in arrays), "") for name in ("image", "label"))
    if not image:
        raise ConfigError("data.root", path, "has no images", _LAYOUT)
    if not label:
        raise ConfigError("data.root", path, "has no labels", "label them with a model (docs/data.md, Extra images)")
    most = _MOST_EXPANSION * path.stat().st_size  # of the whole file: sorted labels compress further than images
    (shape, kind), (count, label_kind) = (_header(arrays.zip, name, most) for name in (image, label))
    wanted = (*count, height, width, channels)
    fits = shape == wanted or (channels == 1 and shape == wanted[:-1])
    if not fits or kind != np.uint8 or label_kind.kind not in "iu" or len(count) != 1 or count[0] == 0:
        found = f"images are {shape}, {kind}, and labels {count}, {label_kind}"
        raise ConfigError("data.root", path, f"{found}; images of the data set are {wanted[-3:]}", _LAYOUT)
    pixels = np.ascontiguousarray(arrays[image].reshape(wanted).transpose(0, 3, 1, 2))
    return {"images": torch.from_numpy(pixels), "labels": torch.from_numpy(arrays[label].astype(np.int64))}


def _header(archive: zipfile.ZipFile, name: str, most: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array; ValueError unless reading it allocates what its entry holds, at most ``most``."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        shape, _, kind = _HEADERS[npy.read_magic(stream)](stream)
        size = stream.tell() + math.prod(shape) * kind.itemsize
    # Arrays of objects are of any size, and refused by their type.
    if not kind.hasobject and (size != info.file_size or size > most):
        raise ValueError(f"{name} claims {size} bytes, where {info.compress_size} hold {info.file_size}")
    return shape, kind
