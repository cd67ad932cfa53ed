"""Whatever a client sends as images, checked, as one array."""

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tla_service.pixels import to_pixels

MAX_IMAGES = 10_000  # in one request
_MAX_PIXELS = 2**26  # in one encoded image
_FORMATS = ("PNG", "JPEG")
_SURELY_8_BIT = 2.0

Images = npt.NDArray[np.float32] | npt.NDArray[np.uint8]


class BadImages(ValueError):  # noqa: N818 - what a client reads is its message, not its name
    """Images that cannot be classified; the message says what was wrong and what to send."""


def read_images(
    sent: Any, image_shape: tuple[int, int, int], *, max_images: int = MAX_IMAGES, resize: bool = False
) -> Images:
    """Check images of any accepted kind and make one array (N, C, H, W) of them, float32 in [0, 1] or uint8.

    `sent` is one of: an array (N,C,H,W), float in [0, 1] or uint8; nested lists of such numbers, floats or, for 8-bit
    values, whole numbers; encoded images, as a list of PNG or JPEG bytes, an array or a data frame's only column of
    them; the same in base64, as JSON has no bytes. With ``resize``, encoded images and 8-bit values may have any size
    and are resized as in training. BadImages if they are not (C, H, W) of the network, not numbers, NaN, out of range,
    too many or none, or cannot be decoded.
    """
    if hasattr(sent, "columns") and hasattr(sent, "iloc"):  # a pandas.DataFrame; pandas need not be there
        if len(sent.columns) != 1:
            raise BadImages(f"the table has {len(sent.columns)} columns; send one column of encoded images")
        sent = sent.iloc[:, 0].tolist()
    if isinstance(sent, np.ndarray) and (sent.dtype.kind in "SUO" or sent.ndim == 0):
        sent = sent.tolist()
    if isinstance(sent, bytes | bytearray | str):
        sent = [sent]
    if not isinstance(sent, Sequence | np.ndarray):
        raise BadImages(f"images are a {type(sent).__name__}; send an array {_wanted(image_shape)} or encoded images")
    if len(sent) == 0:
        raise BadImages("there are no images; send at least one")
    if len(sent) > max_images:
        raise BadImages(f"there are {len(sent)} images; send at most {max_images} at once")
    if isinstance(sent[0], bytes | bytearray | str):
        return np.stack([_decode(number, image, image_shape, resize=resize) for number, image in enumerate(sent)])
    return _fitted(_checked(sent, image_shape, resize=resize), image_shape)


def _fitted(images: Images, image_shape: tuple[int, int, int]) -> Images:
    """8-bit images of another size, resized."""
    from PIL import Image

    if images.shape[1:] == image_shape:
        return images
    if images.dtype != np.uint8:
        raise BadImages(f"images have shape {images.shape}; send {_wanted(image_shape)}, uint8 or encoded images")
    rows = (image[0] if len(image) == 1 else np.moveaxis(image, 0, 2) for image in images)
    pictures = (Image.fromarray(np.ascontiguousarray(row)) for row in rows)
    return np.stack([to_pixels(picture, image_shape, resize=True) for picture in pictures])


def _checked(sent: Sequence[Any] | npt.NDArray[Any], image_shape: tuple[int, int, int], *, resize: bool) -> Images:
    try:
        images = np.ascontiguousarray(sent)
    except (ValueError, TypeError, OverflowError):
        raise BadImages(f"images are no array of numbers; send {_wanted(image_shape)}") from None
    sizes_fit = images.shape[2:] == image_shape[1:] or (resize and images.size)
    if images.ndim != 4 or images.shape[1] != image_shape[0] or not sizes_fit:
        raise BadImages(f"images have shape {images.shape}; send {_wanted(image_shape)}")
    if images.dtype == np.uint8:
        return images
    if np.issubdtype(images.dtype, np.floating):
        if not np.isfinite(images).all():
            raise BadImages("images hold NaN or infinite values; send numbers in [0, 1]")
        low, high = float(images.min()), float(images.max())
        if low < 0 or high > 1:
            hint = "; send 8-bit values as uint8, or divide them by 255" if high >= _SURELY_8_BIT else ""
            raise BadImages(f"images range over [{low:g}, {high:g}]; send [0, 1]{hint}")
        return images.astype(np.float32, copy=False)
    if isinstance(sent, np.ndarray) or not np.issubdtype(images.dtype, np.integer):
        raise BadImages(f"images are {images.dtype}; send floats in [0, 1], or uint8")
    return _whole_numbers(images)


def _whole_numbers(images: npt.NDArray[Any]) -> Images:
    """Whole numbers of a JSON document, which has no types: 8-bit values, unless they could be fractions too."""
    low, high = int(images.min()), int(images.max())
    if low < 0 or high > 255:
        raise BadImages(f"images range over [{low}, {high}]; send 8-bit values in [0, 255], or floats in [0, 1]")
    if high == 1:
        raise BadImages("images hold only 0 and 1, as whole numbers; write 0.0 and 1.0 for black and white")
    return images.astype(np.uint8)


def _decode(number: int, image: object, image_shape: tuple[int, int, int], *, resize: bool) -> npt.NDArray[np.uint8]:
    """One encoded image as (C, H, W), uint8."""
    from PIL import Image

    if isinstance(image, str):
        try:
            image = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise BadImages(f"image {number} is not base64; send PNG or JPEG bytes in base64") from None
    if not isinstance(image, bytes | bytearray):
        raise BadImages(f"image {number} is a {type(image).__name__}; send all images encoded, or none")
    _, height, width = image_shape
    try:
        opened = Image.open(io.BytesIO(image), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImages(f"image {number} has far too many pixels; send {width}x{height}") from None
    except Exception:  # noqa: BLE001 - Pillow's readers let errors of many kinds through
        raise BadImages(f"image {number} is no PNG or JPEG; send one of these") from None
    # Looked at before any pixel is decoded, so that a small file cannot unpack to a huge image.
    if resize and opened.width * opened.height > _MAX_PIXELS:
        raise BadImages(f"image {number} has {opened.width}x{opened.height} pixels; send at most {_MAX_PIXELS}")
    if not resize and opened.size != (width, height):
        found = f"{opened.width}x{opened.height}"
        raise BadImages(f"image {number} has {found} pixels (width x height); send {width}x{height}")
    try:
        opened.load()
    except Exception as error:  # noqa: BLE001 - as above
        raise BadImages(f"image {number} is damaged ({error}); send the whole file") from None
    if opened.mode[0] in "IF":
        raise BadImages(f"image {number} has more than 8 bits a channel; convert it to 8 bits")
    return to_pixels(opened, image_shape, resize=resize)


def _wanted(image_shape: tuple[int, int, int]) -> str:
    return f"(N, {', '.join(map(str, image_shape))})"
