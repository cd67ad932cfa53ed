"""What the data tests share: real data sets, and small sets made on the spot."""

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tla_service.config import DataConfig
from tla_service.data import ImageSource, TrainingBatches
from tla_service.data.order import StepOrder
from tla_service.runtime import WorkerContext

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
    # How long a loader that is closed early waits for its processes; nothing here is so slow that it must.
    loading = torch.utils.data._utils
    loading.MP_STATUS_CHECK_INTERVAL = loading.worker.MP_STATUS_CHECK_INTERVAL = 0.2


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets."""
    folder = Path(os.environ.get("TLA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data sets: set TLA_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache that tests on the real data share, so that each set is decoded once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Data sections with a cache of their own."""

    def make(**fields: Any) -> DataConfig:
        return DataConfig(**{"cache_dir": str(tmp_path / "cache"), **fields})

    return make


def batches_of(
    source: ImageSource,
    indices: torch.Tensor,
    config: DataConfig,
    context: WorkerContext,
    *,
    augment_pool: bool = True,
    **order: Any,
) -> TrainingBatches:
    """Training batches in the order of these settings."""
    steps = StepOrder(source.labels[indices], rank=context.rank, world_size=context.world_size, **order)
    return TrainingBatches(source, indices, steps, config, context, augment_pool=augment_pool)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """An image file of (H, W) or (H, W, 3) pixels."""
    handle = io.BytesIO()
    Image.fromarray(pixels).save(handle, kind, **options)
    return handle.getvalue()


def hub(root: Path, blobs: list[bytes], **splits: dict[str, list[Any]]) -> str:
    """Write one Parquet file per split, with an image in every row and the columns given; returns the folder."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    root.mkdir(parents=True, exist_ok=True)
    for name, columns in splits.items():
        count = len(next(iter(columns.values())))
        images = [blobs[row % len(blobs)] for row in range(count)]
        pq.write_table(pa.table({"image": images, **columns}), root / f"{name}-00000-of-00001.parquet")
    return str(root)


@pytest.fixture(name="encoded")
def encoded_fixture() -> Callable[..., bytes]:
    """Makes image files."""
    return encoded


@pytest.fixture
def fork() -> Iterator[Callable[..., ForkProcess]]:
    """Starts a function in a process of its own, with everything imported, and replaced, as it is here."""
    started: list[ForkProcess] = []

    def start(function: Callable[..., object], *arguments: object) -> ForkProcess:
        process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
        process.close()
