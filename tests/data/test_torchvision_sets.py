"""MNIST and CIFAR as torchvision stores them: real MNIST, and CIFAR files made on the spot."""

import errno
import gzip
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.data.torchvision_sets import read_idx
from tla_service.errors import ConfigError, UnavailableError

MakeConfig = Callable[..., DataConfig]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """A torchvision root with a MNIST of 20 and 10 images, packed."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count, dtype=np.uint8) % 10)))
    return tmp_path / "root"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_real_mnist_from_its_archives_leaves_the_root_alone(real_data: Path, shared_cache: str) -> None:
    root = real_data / "mnist"
    before = files(root)
    mnist = load_dataset(DataConfig(name="mnist", root=str(root), cache_dir=shared_cache))

    assert files(root) == before
    assert (len(mnist.train), len(mnist.test), mnist.image_shape) == (60_000, 10_000, (1, 28, 28))
    assert mnist.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist.train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    # The well-known mean and deviation of the training pixels.
    pixels = mnist.train.fetch(torch.arange(60_000)).double() / 255
    assert (round(float(pixels.mean()), 4), round(float(pixels.std()), 4)) == (0.1307, 0.3081)


@pytest.mark.slow
def test_the_real_files_read_as_torchvision_reads_them(real_data: Path, shared_cache: str, tmp_path: Path) -> None:
    from torchvision.datasets import MNIST

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (real_data / "mnist" / "MNIST" / "raw").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    theirs = MNIST(tmp_path, train=False)
    ours = load_dataset(DataConfig(name="mnist", root=str(tmp_path), cache_dir=shared_cache))
    assert torch.equal(ours.test.fetch(torch.arange(10_000))[:, 0], theirs.data)
    assert torch.equal(ours.test.labels, theirs.targets)


def test_parquet_files_of_another_set_are_refused(
    tmp_path: Path, make_config: MakeConfig, encoded: Callable[..., bytes]
) -> None:
    images = {name: encoded(np.zeros((8, 8, *shape), np.uint8)) for name, shape in (("grey", ()), ("colour", (3,)))}
    for kind, image in images.items():
        (tmp_path / kind).mkdir()
        for part in ("train", "test"):
            table = pa.table({"image": [image] * 4, "label": [0, 1] * 2})
            pq.write_table(table, tmp_path / kind / f"{part}-0.parquet")
    assert load_dataset(make_config(name="mnist", root=str(tmp_path / "grey"))).image_shape == (1, 8, 8)
    with pytest.raises(ConfigError, match=r"data\.root=.*hold 3-channel images, mnist has 1; point it at this set's"):
        load_dataset(make_config(name="mnist", root=str(tmp_path / "colour")))
    # A registered model would resize other images another way than these files are.
    with pytest.raises(ConfigError, match=r"data\.image_size=16: .*data\.name=parquet"):
        load_dataset(make_config(name="mnist", root=str(tmp_path / "grey"), image_size=16))
    with pytest.raises(ConfigError, match=r"data\.root=.*hold 1-channel images, cifar10 has 3"):
        load_dataset(make_config(name="cifar10", root=str(tmp_path / "grey")))


def test_own_files_go_before_parquet_files_elsewhere_in_the_root(
    small_mnist: Path, make_config: MakeConfig, encoded: Callable[..., bytes]
) -> None:
    expected = load_dataset(make_config(name="mnist", root=str(small_mnist)))
    (small_mnist / "other").mkdir()
    for part in ("train", "test"):
        table = pa.table({"image": [encoded(np.zeros((8, 8), np.uint8))] * 4, "label": [0, 1] * 2})
        pq.write_table(table, small_mnist / "other" / f"{part}-0.parquet")
    assert load_dataset(make_config(name="mnist", root=str(small_mnist))).fingerprint == expected.fingerprint
    with pytest.raises(ConfigError, match=r"data\.label_column=label: data\.root is not read as Parquet files"):
        load_dataset(make_config(name="mnist", root=str(small_mnist), label_column="label"))


def test_packed_unpacked_and_bare_folders_agree(small_mnist: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    from torchvision.datasets import MNIST

    raw = small_mnist / "MNIST" / "raw"
    before = files(small_mnist)
    packed = load_dataset(make_config(name="mnist", root=str(small_mnist)))
    assert files(small_mnist) == before
    bare = load_dataset(make_config(name="mnist", root=str(raw)))
    assert packed.fingerprint == bare.fingerprint
    for number, path in enumerate(list(raw.glob("*.gz"))):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
        cache = str(tmp_path / f"other-{number}")  # the first three: some are packed, some are not
        unpacked = load_dataset(make_config(name="mnist", root=str(small_mnist), cache_dir=cache))
        assert unpacked.fingerprint == packed.fingerprint
    theirs = MNIST(small_mnist, train=False)
    assert torch.equal(packed.test.fetch(torch.arange(10))[:, 0], theirs.data)
    assert torch.equal(packed.test.labels, theirs.targets)
    for _ in range(2):
        assert load_dataset(make_config(name="mnist", root=str(small_mnist), image_size=32)).image_shape == (1, 32, 32)
    assert len([*(tmp_path / "cache" / "decoded").glob("*.safetensors")]) == 2  # which processes share


def test_the_missing_idx_file_is_named(small_mnist: Path, make_config: MakeConfig) -> None:
    (small_mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UnavailableError, match=r"raw/t10k-labels-idx1-ubyte\.gz is missing"):
        load_dataset(make_config(name="mnist", root=str(small_mnist)))


def test_fashion_mnist_has_names(small_mnist: Path, make_config: MakeConfig) -> None:
    shutil.move(small_mnist / "MNIST", small_mnist / "FashionMNIST")
    assert load_dataset(make_config(name="fashion_mnist", root=str(small_mnist))).class_names[9] == "Ankle boot"


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8bnonsense", "cut", "rubbish inside", "too short inside"])
def test_a_damaged_archive_is_named(small_mnist: Path, make_config: MakeConfig, damage: bytes | str) -> None:
    path = small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    content = {
        "cut": whole[: len(whole) // 2],
        "rubbish inside": gzip.compress(b"nonsense"),
        "too short inside": gzip.compress(gzip.decompress(whole)[:-1]),
    }
    path.write_bytes(damage if isinstance(damage, bytes) else content[damage])
    with pytest.raises(UnavailableError, match=r"data\.root=.*train-images-idx3-ubyte.*damaged"):
        load_dataset(make_config(name="mnist", root=str(small_mnist)))


@settings(deadline=None, max_examples=60)
@given(content=st.binary(max_size=40), header=st.sampled_from([b"", b"\0\0\x08\x01", b"\0\0\x08\x03", b"\0\0\x08\xff"]))
def test_rubbish_is_not_read_as_an_array(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, header: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "rubbish-idx3-ubyte"
    path.write_bytes(header + content)
    try:
        found = read_idx(path)
    except UnavailableError as error:
        assert "damaged" in str(error)
    else:
        assert idx(found.numpy()) == header + content


def test_labels_of_another_set_are_refused(small_mnist: Path, make_config: MakeConfig) -> None:
    raw = small_mnist / "MNIST" / "raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte.gz", raw / "train-labels-idx1-ubyte.gz")
    with pytest.raises(UnavailableError, match="do not match labels"):
        load_dataset(make_config(name="mnist", root=str(small_mnist)))


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A torchvision root with a CIFAR-10 of 50 and 10 images, pickled as the original is."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for number, name in enumerate(names):
        data = np.random.default_rng(number).integers(0, 256, (10, 3072), np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    # The files are not the originals, so their checksums cannot be met.
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in names[:-1]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[-1], None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    return tmp_path / "root"


def test_cifar_from_batches_and_from_the_archive(small_cifar: Path, make_config: MakeConfig) -> None:
    batches = load_dataset(make_config(name="cifar10", root=str(small_cifar)))
    assert (len(batches.train), len(batches.test), batches.image_shape) == (50, 10, (3, 32, 32))
    assert batches.class_names[3] == "class 3"
    first = np.random.default_rng(0).integers(0, 256, (10, 3072), np.uint8).reshape(10, 3, 32, 32)
    assert np.array_equal(batches.train.fetch(torch.arange(10)).numpy(), first)

    folder = small_cifar / "cifar-10-batches-py"
    with tarfile.open(small_cifar / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    assert load_dataset(make_config(name="cifar10", root=str(small_cifar))).fingerprint == batches.fingerprint
    assert not folder.exists()


def test_a_missing_or_damaged_batch_is_reported(small_cifar: Path, make_config: MakeConfig) -> None:
    batch = small_cifar / "cifar-10-batches-py" / "data_batch_3"
    batch.unlink()
    with pytest.raises(UnavailableError, match=r"data\.root=.*data_batch_3 is missing; .*data\.download"):
        load_dataset(make_config(name="cifar10", root=str(small_cifar)))


def test_batches_whose_checksum_is_wrong_are_not_unpickled(
    small_cifar: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "0" * 32]])
    with pytest.raises(UnavailableError, match=r"damaged .*corrupted"):
        load_dataset(make_config(name="cifar10", root=str(small_cifar)))


def test_a_damaged_cifar_archive_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"rubbish")
    with pytest.raises(UnavailableError, match=r"data\.root=.*cifar-10-python\.tar\.gz: damaged"):
        load_dataset(make_config(name="cifar10", root=str(tmp_path)))


def test_an_archive_that_must_not_be_read_is_named(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may read everything, so the answer of the system is what is replaced.
    def denied(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"rubbish")
    whole = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode: (denied if path.suffix == ".gz" else whole)(path, *mode))
    with pytest.raises(UnavailableError, match=r"data\.root=.*python\.tar\.gz: no permission; let this user read it"):
        load_dataset(make_config(name="cifar10", root=str(tmp_path)))


@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_a_failing_download_is_reported(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from torchvision.datasets import cifar, mnist

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(mnist, "download_and_extract_archive", unreachable)
    monkeypatch.setattr(cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(UnavailableError, match=r"data\.root=.*no route to host"):
        load_dataset(make_config(name=name, root=str(tmp_path / "new"), download=True))


def test_downloading_into_a_bucket_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.download=True: an s3:// root is only read"):
        load_dataset(make_config(name="mnist", root="s3://bucket/mnist", download=True))


def test_an_archive_that_unpacks_to_more_than_the_set_is_refused(
    small_mnist: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tla_service.data.torchvision_sets._MOST_BYTES", 10_000)
    config = make_config(name="mnist", root=str(small_mnist))
    with pytest.raises(UnavailableError, match=r"train-images-idx3-ubyte\.gz: unpacks to more than 0 MB, unlike the"):
        load_dataset(config)
    assert not list(Path(config.cache_dir).rglob("*ubyte*"))
