"""Extra images from npz files: as published, and whatever else has that name."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from tla_service.data.npz import read_npz
from tla_service.errors import ConfigError, UnavailableError, UserError

COUNT, SHAPE = 7, (3, 5, 4)
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 5, 4, 3), np.uint8)
LABELS = np.arange(COUNT)


def content(*, save: Any = np.savez, **arrays: Any) -> bytes:
    handle = io.BytesIO()
    save(handle, **arrays)
    return handle.getvalue()


def read(folder: Path, whole: bytes, shape: tuple[int, int, int] = SHAPE) -> Any:
    path = folder / "extra.npz"
    path.write_bytes(whole)
    return read_npz(path, shape)


VALID = content(image=IMAGES, label=LABELS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("image", "label"), ("images", "labels")])
@pytest.mark.parametrize("labels", [LABELS.astype(kind) for kind in ("int64", "uint8", ">i4")])
def test_published_layouts(tmp_path: Path, save: Any, names: tuple[str, str], labels: Any) -> None:
    found = read(tmp_path, content(save=save, **dict(zip(names, (IMAGES, labels), strict=True)), other=np.zeros(2)))
    assert found["labels"].tolist() == LABELS.tolist()
    assert found["images"].is_contiguous()
    for number, row, column, channel in np.ndindex(IMAGES.shape):
        assert found["images"][number, channel, row, column] == IMAGES[number, row, column, channel]


def test_labels_in_order_may_compress_further_than_images(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (6000, 5, 4, 3), np.uint8)
    whole = content(save=np.savez_compressed, image=images, label=np.arange(6000) // 3000)
    assert read(tmp_path, whole)["labels"].bincount().tolist() == [3000, 3000]


def test_grey_images_need_no_axis_of_channels_and_columns_may_come_first(tmp_path: Path) -> None:
    grey = IMAGES[..., 0]
    for images in (grey, grey[..., None], np.asfortranarray(grey)):
        found = read(tmp_path, content(image=images, label=LABELS), (1, 5, 4))
        assert (found["images"][:, 0].numpy() == grey).all()


UNFIT = {
    "no images": ({"label": LABELS}, "has no images; save uint8 images"),
    "no labels": ({"image": IMAGES}, "has no labels; label them with a model"),
    "floats": ({"image": IMAGES / 255, "label": LABELS}, "images are (7, 5, 4, 3), float64"),
    "channels first": ({"image": IMAGES.transpose(0, 3, 1, 2), "label": LABELS}, "images are (7, 3, 5, 4), uint8"),
    "grey": ({"image": IMAGES[..., 0], "label": LABELS}, "images of the data set are (5, 4, 3)"),
    "other counts": ({"image": IMAGES, "label": LABELS[1:]}, "and labels (6,), int64"),
    "scores": ({"image": IMAGES, "label": np.eye(COUNT)}, "and labels (7, 7), float64"),
    "float labels": ({"image": IMAGES, "label": LABELS / 1}, "and labels (7,), float64"),
    "one label": ({"image": IMAGES[0], "label": np.array(3)}, "and labels (), int64"),
    "nothing": ({"image": IMAGES[:0], "label": LABELS[:0]}, "and labels (0,), int64"),
    "objects": ({"image": IMAGES, "label": LABELS.astype(object)}, "and labels (7,), object"),
    "objects for images": ({"image": np.array([{}] * 7), "label": LABELS}, "images are (7,), object"),
}


@pytest.mark.parametrize(("arrays", "words"), UNFIT.values(), ids=UNFIT.keys())
def test_what_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, content(**arrays))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def packed(header: tuple[int, ...], body: bytes, kind: int = zipfile.ZIP_STORED) -> bytes:
    """A file whose images claim a shape."""
    handle, array = io.BytesIO(), io.BytesIO()
    npy.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": header})
    with zipfile.ZipFile(handle, "w", kind) as archive:
        archive.writestr("image.npy", array.getvalue() + body)
        labels = io.BytesIO()
        np.save(labels, LABELS)
        archive.writestr("label.npy", labels.getvalue())
    return handle.getvalue()


@pytest.mark.parametrize(
    "whole",
    [
        packed((10**15, 5, 4, 3), bytes(420)),
        packed((-7, 5, 4, 3), bytes(420)),
        packed((7, 5, 4, 3), bytes(421)),
        packed((7, 5, 4, 3), bytes(419)),
        packed((7, 5, 4, 30_000), bytes(4_200_000), zipfile.ZIP_DEFLATED),
    ],
    ids=["too few bytes for its shape", "negative", "a byte too many", "a byte too few", "a zip bomb"],
)
def test_sizes_are_checked_before_anything_is_read(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npy, "read_array", lambda *_, **__: pytest.fail("reads"))
    with pytest.raises(UnavailableError, match=r"not a readable npz file \(image claims -?\d+ bytes, where \d+ hold"):
        read(tmp_path, whole)


@pytest.mark.parametrize("whole", [b"", b"PK\3\4", b"<html>", b"\x80\4N."])
def test_other_files_are_refused(tmp_path: Path, whole: bytes) -> None:
    with pytest.raises(UnavailableError, match="not a readable npz file"):
        read(tmp_path, whole)


@settings(deadline=None, max_examples=150)
@given(place=st.integers(0, len(VALID) - 1), bits=st.integers(1, 255), end=st.integers(0, len(VALID)))
def test_damage_is_found_or_does_no_harm(
    tmp_path_factory: pytest.TempPathFactory, place: int, bits: int, end: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    flipped = bytearray(VALID)
    flipped[place] ^= bits
    for damaged in (bytes(flipped), VALID[:end]):
        try:
            found = read(folder, damaged)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert found["labels"].tolist() == LABELS.tolist()
            assert (found["images"].permute(0, 2, 3, 1).numpy() == IMAGES).all()
