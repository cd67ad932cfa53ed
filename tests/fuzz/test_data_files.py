"""Damaged data sets: refused with one message, or read as they were written.

What must not be accepted: a file whose own checksum does not match (gzip, zip, PNG), whose parts contradict each other
(sizes, counts, shapes, truncation), or that a plain reader of its format refuses (Parquet). Pixels that no checksum
covers (IDX, JPEG, BMP, an uncompressed Parquet page) may change unnoticed, but no image may be lost or invented.
Nothing may be written outside the cache, and no file may unpack to more memory than `MOST_BYTES`.
"""

import functools
import gzip
import io
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet as pq

from jobs.inspect_data import main as inspect
from tests.data.conftest import encoded, hub
from tests.fuzz.harness import MOST_BYTES, Faults, chunks, environment, mutated, random_of, run_case
from tla_service.config import DataConfig
from tla_service.data import Dataset, load_dataset

COUNT = 500
SIDE = 12
FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF", "gif": "GIF"}
NAMES = {"raw": "mnist", "gz": "mnist", "parquet": "parquet", "zip": "image_folder"}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, *shape), np.uint8)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small set of each kind."""
    root = tmp_path_factory.mktemp("sets")
    for part, count in (("train", 20), ("t10k", 10)):
        files = {
            "images-idx3": np.stack([pixels(number) for number in range(count)]),
            "labels-idx1": np.arange(count) % 10,
        }
        for name, array in files.items():
            for folder, pack in (("raw", bytes), ("gz", gzip.compress)):
                (root / folder).mkdir(exist_ok=True)
                ending = ".gz" if folder == "gz" else ""
                (root / folder / f"{part}-{name}-ubyte{ending}").write_bytes(pack(idx(array.astype(np.uint8))))
    labels = {"train": {"label": [0, 1] * 6}, "test": {"label": [0, 1] * 2}}
    hub(root / "parquet", [encoded(pixels(number, 3)) for number in range(12)], **labels)
    for ending, kind in FORMATS.items():
        for part, count in (("train", 5), ("test", 2)):
            for name in ("cat", "dog"):
                (root / ending / part / name).mkdir(parents=True)
                for number in range(count):
                    image = encoded(pixels(number + 9 * (name == "cat"), 3), kind)
                    (root / ending / part / name / f"{number}.{ending}").write_bytes(image)
    (root / "zip").mkdir()
    with zipfile.ZipFile(root / "zip" / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((root / "png").rglob("*.png")):
            archive.writestr(zipfile.ZipInfo(path.relative_to(root / "png").as_posix()), path.read_bytes())
    return root


def content(dataset: Dataset) -> list[Any]:
    """All that a data set has: class names, and pixels and labels of each split."""
    parts = [dataset.train, dataset.test]
    return [dataset.class_names, *((part.fetch(torch.arange(len(part))), part.labels) for part in parts)]


def same(one: list[Any], two: list[Any]) -> bool:
    pairs = zip(one[1:], two[1:], strict=True)
    return one[0] == two[0] and all(
        torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True)
    )


def read(root: Path, kind: str, cache: Path, **settings: Any) -> list[Any]:
    name = NAMES.get(kind, "image_folder")
    size = SIDE if name == "image_folder" else None
    return content(
        load_dataset(DataConfig(name=name, root=str(root), cache_dir=str(cache), image_size=size, **settings))
    )


# Damage that is made to measure; each takes a file of the set, or its root, and says whether it may be accepted.
def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, extra: bytes = b"", rows: bytes = b"\0" * 99
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def huge_jpeg(side: int) -> bytes:
    blob = bytearray(encoded(pixels(0, 3), "JPEG"))
    place = blob.index(b"\xff\xc0") + 5
    blob[place : place + 4] = struct.pack(">HH", side, side)
    return bytes(blob)


BAD_IMAGES: dict[str, Callable[[], bytes]] = {
    "png of 60,000 x 60,000": lambda: png(60_000, 60_000),
    "png of 12,000 x 12,000": lambda: png(12_000, 12_000, rows=bytes(12_000 * 36_001)),
    "png of 2^31 x 1": lambda: png(2**31 - 1, 1),
    "png of no width": lambda: png(0, SIDE),
    "png without rows": lambda: png(SIDE, SIDE, rows=b""),
    "png of depth 3": lambda: png(SIDE, SIDE, depth=3),
    "png of colour 5": lambda: png(SIDE, SIDE, colour=5),
    "png with a long text": lambda: png(SIDE, SIDE, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)) * 3)),
    "jpeg of 65,500 x 65,500": lambda: huge_jpeg(65_500),
    "jpeg of no size": lambda: huge_jpeg(0),
    "16 bits": lambda: encoded(pixels(0).astype(np.uint16) * 200),
    "nothing": lambda: b"",
    "text": lambda: b"not an image\n" * 9,
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps that runs": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n(x) (w) file\n",
    "bmp of 2^31": lambda: b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 2**31 - 1, 9, 1, 24, 0, 0, 0, 0, 0, 0),
}  # fmt: skip


def bad_image(rng: random.Random, root: Path) -> str:
    name = rng.choice([*BAD_IMAGES])
    path = rng.choice(sorted(root.rglob("*.*")))
    path.unlink()
    path.with_suffix(rng.choice([path.suffix, ".png", ".jpg"])).write_bytes(BAD_IMAGES[name]())
    return name


def odd_file(rng: random.Random, root: Path) -> str:
    """Something else than a file under an image's name."""
    path = rng.choice(sorted(path for path in root.rglob("*.*") if path.is_file()))
    path.unlink()
    kind = rng.choice(["/dev/zero", "nowhere", "itself", "..", "pipe", "1 TB", "/proc/self/mem"])
    if kind == "pipe":
        os.mkfifo(path)
        return "skipped: a named pipe"
    if kind == "1 TB":
        with path.open("wb") as file:
            file.truncate(10**12)
    else:
        path.symlink_to(path if kind == "itself" else kind)
    return kind


def bad_idx(rng: random.Random, root: Path) -> str:
    path = rng.choice(sorted(root.iterdir()))
    array = np.frombuffer(path.read_bytes(), np.uint8, offset=16 if "images" in path.name else 8)
    count = 20 if "train" in path.name else 10
    shape = (count, SIDE, SIDE) if "images" in path.name else (count,)
    header, name = bytearray(idx(array.reshape(shape))[: 4 + 4 * len(shape)]), "header"
    kind = rng.choice(["dimension", "dimensions", "type", "none", "labels", "huge", "cube", "fewer"])
    if kind == "dimension":
        header[4:8] = struct.pack(">I", rng.choice([0, count - 1, count + 1, 2**31, 2**32 - 1]))
    elif kind == "dimensions":
        header[3] = rng.choice([0, len(shape) - 1, len(shape) + 1, 5, 255])
    elif kind == "type":
        header[2] = rng.choice([9, 11, 13, 0, 255])
    elif kind == "huge":
        header[4:] = b"\xff" * (4 * len(shape))
    elif kind == "cube":
        header[4:] = struct.pack(">I", 2**16) * len(shape)  # whose product is 0 in 32 bits
    elif kind == "labels" and "labels" in path.name:
        array = array + 200
    elif kind == "fewer":
        header[4:8], array = struct.pack(">I", count - 1), array[: len(array) // count * (count - 1)]
    else:
        header, array, name = header[:4] + bytes(4 * len(shape)), array[:0], "no images"
    path.write_bytes(bytes(header) + array.tobytes())
    return f"{path.name}: {kind} {name}"


@functools.cache
def zeros(megabytes: int, window: int) -> bytes:
    """Compressed zeros: a thousandth of their size."""
    packer = zlib.compressobj(1, zlib.DEFLATED, window)
    return b"".join([packer.compress(bytes(10**6)) for _ in range(megabytes)]) + packer.flush()


def gzip_bomb(rng: random.Random, root: Path) -> str:
    path = rng.choice(sorted(root.iterdir()))
    path.write_bytes(zeros(300, 31))
    return "300 MB in a gzip file"


def link(name: str, target: str) -> tuple[zipfile.ZipInfo, str]:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry, target


def bad_zip(rng: random.Random, root: Path) -> str:
    path = root / "set.zip"
    kind = rng.choice(
        ["up", "absolute", "windows", "link out", "loop", "links", "many links", "bomb", "encrypted", "method", "nul"]
    )
    if kind in ("encrypted", "method"):
        blob = bytearray(path.read_bytes())
        place = blob.index(b"PK\x01\x02") + (8 if kind == "encrypted" else 10)
        blob[place] = 1 if kind == "encrypted" else 97
        path.write_bytes(blob)
        return f"skipped: {kind}" if path.read_bytes()[place - 8 :].split(b"\0\0\0")[0] == b"" else kind
    image = encoded(pixels(5, 3))
    names = {
        "up": "../../train/cat/x.png",
        "absolute": "/train/cat/x.png",
        "windows": "train\\..\\..\\..\\x.png",
        "nul": "train/cat/\0x.png",
    }
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        if kind in names:
            archive.writestr(zipfile.ZipInfo(names[kind]), image)
        elif kind == "link out":
            archive.writestr(
                *link("train/cat/x.png", rng.choice(["/etc/passwd", "../../../../../etc/passwd", "/dev/zero"]))
            )
        elif kind == "loop":
            archive.writestr(*link("train/cat/x.png", "x.png"))
        elif kind == "links":  # 2^25 names
            for number in range(25):
                for twin in "ab":
                    archive.writestr(*link(f"train/cat/l{number}/{twin}", f"../l{number + 1}"))
            archive.writestr("train/cat/l25/x.png", image)
        elif kind == "many links":
            for number in range(9000):
                archive.writestr(*link(f"train/cat/l{number}", "../dog"))
        else:
            archive.writestr("train/cat/x.png", bytes(3 * 10**8))
    return kind


def bad_parquet(rng: random.Random, root: Path) -> str:
    path = rng.choice(sorted(root.iterdir()))
    count = 12 if "train" in path.name else 4
    images, labels = [encoded(pixels(number, 3)) for number in range(count)], [0, 1] * (count // 2)
    tables: dict[str, Callable[[], Any]] = {
        "no image": lambda: {"image": [None, *images[1:]], "label": labels},
        "empty image": lambda: {"image": [b"", *images[1:]], "label": labels},
        "no label": lambda: {"image": images, "label": [None, *labels[1:]]},
        "negative": lambda: {"image": images, "label": [-(2**62), *labels[1:]]},
        "text": lambda: {"image": images, "label": ["\x1b[31m\n", *map(str, labels[1:])]},
        "lists": lambda: {"image": images, "label": [[label] for label in labels]},
        "fractions": lambda: {"image": images, "label": [label + 0.5 for label in labels]},
        "one class": lambda: {"image": images, "label": [0] * count},
        "beyond": lambda: {"image": images, "label": pa.array([2**64 - 1, *labels[1:]], pa.uint64())},
        "no rows": lambda: {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
        "text for images": lambda: {"image": ["x"] * count, "label": labels},
        "huge image": lambda: {"image": [BAD_IMAGES["png of 60,000 x 60,000"](), *images[1:]], "label": labels},
    }
    kind = rng.choice([*tables, "twice", "ended", "rows"])
    if kind == "rows":  # the number of rows of the file or of its only row group, as a zigzag varint
        blob = bytearray(path.read_bytes())
        size = int.from_bytes(blob[-8:-4], "little")
        places = [
            at for at in range(len(blob) - 8 - size, len(blob) - 8) if blob[at : at + 2] == bytes([0x16, 2 * count])
        ]
        blob[rng.choice(places) + 1] = rng.choice([2, 2 * count - 2, 2 * count + 2, 1])
        path.write_bytes(blob)
        return "a wrong number of rows"
    if kind == "twice":
        table = pa.Table.from_arrays(
            [pa.array(images), pa.array(labels), pa.array(labels)], names=["image", "label", "label"]
        )
    else:
        table = pa.table(tables.get(kind, tables["text"])())
    pq.write_table(table, path)
    if kind == "ended":
        path.write_bytes(path.read_bytes()[:-4] + b"PARE")
    # Class by class, labels may be any integers or texts; those of the test set must be among the training set's.
    return f"may pass: {kind}" if kind in ("text", "beyond", "one class") else kind


CRAFTED: dict[str, list[Callable[[random.Random, Path], str]]] = {
    "raw": [bad_idx], "gz": [gzip_bomb], "zip": [bad_zip], "parquet": [bad_parquet],
}  # fmt: skip
UNCHECKED = {"raw", "jpg", "bmp", "webp", "tif", "gif", "parquet"}  # pixels have no checksum


def may_differ(kind: str, damage: str, path: Path, found: list[Any], whole: list[Any]) -> bool:
    """Whether a damaged set may be read as something else: its pixels only, in a format without checksums."""
    if damage.startswith("may pass"):
        return True
    alike = found[0] == whole[0] and [len(labels) for _, labels in found[1:]] == [
        len(labels) for _, labels in whole[1:]
    ]
    if kind == "raw" and "labels" in path.name:
        return alike and int(max(labels.max() for _, labels in found[1:])) < 10
    if kind == "parquet":  # labels are not checked either, so classes may change
        return (
            [len(labels) for _, labels in found[1:]]
            == [12, 4]
            == [pq.read_table(each).num_rows for each in sorted(path.parent.iterdir(), reverse=True)]
        )
    return kind in UNCHECKED and alike and not damage.startswith("cut")


@chunks(COUNT, 10)
def test_damaged_data_are_refused_or_read_as_they_were(numbers: range, sets: Path, tmp_path: Path) -> None:
    whole: dict[str, list[Any]] = {}
    with Faults() as faults:
        for number in numbers:
            rng = random_of("data", number)
            kind = rng.choice(["raw", "gz", "zip", "parquet", "zip", "parquet", "png", *FORMATS])
            if kind not in whole:
                whole[kind] = read(sets / kind, kind, tmp_path / "whole")
            root, cache = shutil.copytree(sets / kind, tmp_path / "set"), tmp_path / "cache"
            path = rng.choice(sorted(path for path in root.rglob("*") if path.is_file()))
            if rng.random() < 0.4:
                damage = rng.choice(CRAFTED.get(kind, [bad_image, bad_image, odd_file]))(rng, root)
            else:
                damage, damaged = mutated(rng, path.read_bytes())
                path.write_bytes(damaged)
            found: list[Any] = []
            looked = rng.random() < 0.3
            if looked:
                name = NAMES.get(kind, "image_folder")
                where = [f"--data.name={name}", f"--data.root={root}", f"--data.cache_dir={cache}"]
                with environment({}, where, tmp_path):
                    ended = run_case(inspect)
            if not looked or ended.code is None:
                before = None if not looked else ended
                load = functools.partial(read, root, kind, cache, residency=rng.choice(["auto", "stream"]))
                ended = run_case(lambda load=load, found=found: found.extend(load()))
                if before is not None and ended.code is not None and "Traceback" not in ended.text:
                    faults.add("inspect_data accepted it", number, (kind, path.name, damage), ended)
            accepted = bool(found) and (same(found, whole[kind]) or may_differ(kind, damage, path, found, whole[kind]))
            fault = ended.excess if accepted else ended.fault
            if not damage.startswith("skipped"):
                faults.add(fault, number, (kind, path.name, damage), ended)
            assert {each.name for each in tmp_path.iterdir()} <= {"set", "cache", "whole"}
            shutil.rmtree(root)
            shutil.rmtree(cache, ignore_errors=True)


@pytest.mark.fuzz
def test_a_parquet_file_of_a_few_kilobytes_does_not_unpack_to_gigabytes(sets: Path, tmp_path: Path) -> None:
    root = shutil.copytree(sets / "parquet", tmp_path / "set")
    code = (
        "import sys, pyarrow as pa; from pyarrow import parquet as pq; image = bytes(3 * 10**8);"
        "pq.write_table(pa.table({'image': [image] * 6, 'label': [0, 1] * 3}), sys.argv[1], compression='zstd')"
    )
    subprocess.run([sys.executable, "-c", code, str(next(root.glob("train*")))], check=True)
    ended = run_case(lambda: read(root, "parquet", tmp_path / "cache"))
    assert ended.code == 3, ended
    assert ended.extra_bytes < 2 * MOST_BYTES, ended  # the image, of 300 MB, a few times


def test_the_image_that_is_only_large_is_read() -> None:
    assert Image.open(io.BytesIO(png(SIDE, SIDE, rows=bytes(SIDE * (3 * SIDE + 1))))).size == (SIDE, SIDE)
