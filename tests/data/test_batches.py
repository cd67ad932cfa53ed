"""Training and evaluation batches: resident, streamed, resumed, sharded."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import batches_of
from tla_service.config import DataConfig
from tla_service.data.batches import Batch, EvaluationBatches, StepBatch
from tla_service.data.decoding import probe
from tla_service.data.sources import ArraySource, FileSource
from tla_service.data.trees import FolderTree, TreeBlobs
from tla_service.errors import ConfigError, UnavailableError
from tla_service.runtime import WorkerContext

AUGMENTED = {"crop_padding": 1, "flip": True, "saturation": 1.5}
OPTIONS = {"global_batch_size": 16, "seed": 5, "pool_size": 9, "same_class_positives": True}


def array_source(count: int = 60) -> ArraySource:
    images = torch.randint(0, 256, (count, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return ArraySource(images, torch.arange(count) % 4)


@pytest.fixture(scope="module")
def file_source(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    folder = tmp_path_factory.mktemp("pictures")
    source = array_source()
    for number, image in enumerate(source.images):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(folder / f"{number:03}.png")
    tree = FolderTree(folder)
    blobs = TreeBlobs(tree, tree.names)
    return FileSource(blobs, source.labels, probe(blobs, None))


def equal(first: StepBatch, second: StepBatch) -> bool:
    pairs = ((first.anchors, second.anchors), (first.positives, second.positives), (first.pool, second.pool))
    return all(
        (one is None and two is None) or (torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels))
        for one, two in pairs
    )


def same(first: list[StepBatch], second: list[StepBatch]) -> bool:
    return len(first) == len(second) and all(equal(one, two) for one, two in zip(first, second, strict=True))


def wait_for_no_children() -> None:
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_batches_carry_the_right_pixels_labels_and_types() -> None:
    source = array_source()
    indices = torch.arange(10, 50)
    batches = batches_of(source, indices, DataConfig(), WorkerContext(), **OPTIONS)
    lookup = {tuple(source.images[index].flatten().tolist()): index for index in indices.tolist()}

    def original(batch: Batch) -> list[int]:
        assert batch.images.dtype == torch.float32
        return [lookup[tuple((image * 255).round().int().flatten().tolist())] for image in batch.images]

    seen = []
    for step in batches.epoch(0):
        anchors, positives, pool = original(step.anchors), original(step.positives), original(step.pool)
        seen += anchors
        assert step.anchors.labels.tolist() == source.labels[anchors].tolist()
        assert step.positives.labels.tolist() == step.anchors.labels.tolist() == source.labels[positives].tolist()
        assert not any(anchor == positive for anchor, positive in zip(anchors, positives, strict=True))
        assert step.pool.labels.tolist() == source.labels[pool].tolist()
        assert len(set(pool)) == 9
    assert sorted(seen) == indices.tolist()
    assert batches.steps_per_epoch == 3


def test_parts_that_are_not_asked_for_are_absent() -> None:
    source = array_source()
    batches = batches_of(source, torch.arange(60), DataConfig(), WorkerContext(), global_batch_size=16, seed=0)
    step = next(batches.epoch(0))
    assert step.positives is None
    assert step.pool is None
    assert len(step.anchors.labels) == 15


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_streaming_equals_resident_bit_for_bit(file_source: FileSource, workers: int, rank: int) -> None:
    context = WorkerContext(rank=rank, world_size=2)
    indices = torch.arange(5, 60)
    resident = batches_of(array_source(), indices, DataConfig(**AUGMENTED), context, **OPTIONS)
    config = DataConfig(residency="stream", loader_workers=workers, **AUGMENTED)
    with closing(batches_of(file_source, indices, config, context, **OPTIONS)) as streamed:
        for epoch in range(2):
            assert same(list(streamed.epoch(epoch)), list(resident.epoch(epoch)))
        assert same(list(streamed.epoch(1, 2)), list(resident.epoch(1))[2:])
    wait_for_no_children()


def test_a_file_source_kept_on_the_device_gives_the_same(file_source: FileSource) -> None:
    indices = torch.arange(3, 60)
    config = DataConfig(residency="device", **AUGMENTED)
    kept = batches_of(file_source, indices, config, WorkerContext(), **OPTIONS)
    resident = batches_of(array_source(), indices, DataConfig(**AUGMENTED), WorkerContext(), **OPTIONS)
    assert same(list(kept.epoch(0)), list(resident.epoch(0)))


@pytest.mark.parametrize("residency", ["device", "stream"])
def test_resuming_at_a_step_equals_the_tail(residency: str) -> None:
    config = DataConfig(residency=residency, loader_workers=1, **AUGMENTED)

    def tail(start: int) -> list[StepBatch]:
        with closing(batches_of(array_source(), torch.arange(60), config, WorkerContext(), **OPTIONS)) as batches:
            return list(batches.epoch(3, start))

    assert same(tail(2), tail(0)[2:])
    assert tail(4) == []
    assert not same(tail(0)[:1], tail(1)[:1])


def test_an_abandoned_epoch_leaves_nothing_behind_in_the_next(file_source: FileSource) -> None:
    config = DataConfig(residency="stream", loader_workers=2, **AUGMENTED)
    resident = batches_of(array_source(), torch.arange(60), DataConfig(**AUGMENTED), WorkerContext(), **OPTIONS)
    with closing(batches_of(file_source, torch.arange(60), config, WorkerContext(), **OPTIONS)) as streamed:
        abandoned = streamed.epoch(0)
        next(abandoned)
        abandoned.close()
        assert same(list(streamed.epoch(1)), list(resident.epoch(1)))
    wait_for_no_children()


def test_loader_processes_outlive_epochs_and_end_with_close() -> None:
    config = DataConfig(residency="stream", loader_workers=2)
    batches = batches_of(array_source(), torch.arange(60), config, WorkerContext(), **OPTIONS)
    list(batches.epoch(0))
    first = {child.pid for child in multiprocessing.active_children()}
    list(batches.epoch(1))
    assert first
    assert {child.pid for child in multiprocessing.active_children()} == first
    batches.close()
    wait_for_no_children()


@pytest.mark.parametrize("residency", ["device", "stream"])
def test_the_global_generator_is_neither_used_nor_moved(residency: str) -> None:
    config = DataConfig(residency=residency, loader_workers=0, **AUGMENTED)
    batches = batches_of(array_source(), torch.arange(60), config, WorkerContext(), **OPTIONS)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(batches.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, list(batches.epoch(0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_in_a_loader_process_names_its_file(tmp_path: Path, workers: int) -> None:
    for number in range(8):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / f"{number}.png")
    tree = FolderTree(tmp_path)
    blobs = TreeBlobs(tree, tree.names)
    source = FileSource(blobs, torch.arange(8) % 2, probe(blobs, None))
    (tmp_path / "5.png").write_bytes(b"rubbish")
    config = DataConfig(residency="stream", loader_workers=workers)
    batches = batches_of(source, torch.arange(8), config, WorkerContext(), global_batch_size=8, seed=0)

    with closing(batches), pytest.raises(UnavailableError, match=r"data\.root=.*5\.png: not a readable image"):
        list(batches.epoch(0))


def test_roles_are_augmented_apart_and_the_pool_on_request() -> None:
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(8, -1, -1, -1)
    source = ArraySource(images, torch.zeros(8, dtype=torch.int64))
    options = {"global_batch_size": 8, "seed": 0, "pool_size": 8, "same_class_positives": True}

    def step(augment_pool: bool) -> StepBatch:
        every = torch.arange(8)
        config = DataConfig(crop_padding=4)
        batches = batches_of(source, every, config, WorkerContext(), augment_pool=augment_pool, **options)
        return next(batches.epoch(0))

    augmented = step(True)
    parts = [augmented.anchors.images, augmented.positives.images, augmented.pool.images]
    assert not any(torch.equal(parts[one], parts[two]) for one, two in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(step(False).pool.images, images.float() / 255)
    assert torch.equal(step(False).anchors.images, augmented.anchors.images)


def test_augmentation_is_drawn_anew_each_epoch_step_and_rank() -> None:
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(64, -1, -1, -1)
    source = ArraySource(image, torch.zeros(64, dtype=torch.int64))
    seen = set()
    for rank in range(2):
        context = WorkerContext(rank=rank, world_size=2)
        config = DataConfig(crop_padding=8)
        batches = batches_of(source, torch.arange(64), config, context, global_batch_size=32, seed=0)
        seen |= {tuple(step.anchors.images.flatten().tolist()) for epoch in range(2) for step in batches.epoch(epoch)}
    assert len(seen) == 8


def test_too_large_a_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mining\.pool_size=61"):
        batches_of(
            array_source(),
            torch.arange(60),
            DataConfig(),
            WorkerContext(),
            global_batch_size=16,
            seed=0,
            pool_size=61,
        )


@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 60), world=st.integers(1, 5), batch=st.integers(1, 20))
def test_evaluation_covers_every_image_once_in_order(count: int, world: int, batch: int) -> None:
    source = array_source()
    indices = torch.arange(60).flip(0)[:count]
    seen: list[int] = []
    for rank in range(world):
        batches = EvaluationBatches(source, indices, WorkerContext(rank=rank, world_size=world), batch_size=batch)
        mine = indices[rank::world]
        found = list(batches)
        assert [len(item.labels) for item in found] == [len(chunk) for chunk in mine.split(batch) if len(chunk)]
        if found:
            assert torch.equal(torch.cat([item.images for item in found]), source.images[mine].float() / 255)
            assert torch.equal(torch.cat([item.labels for item in found]), source.labels[mine])
        seen += mine.tolist()
        assert [item.labels.tolist() for item in batches] == [item.labels.tolist() for item in found]
    assert sorted(seen) == sorted(indices.tolist())


def test_evaluation_can_be_left_early(file_source: FileSource) -> None:
    def first() -> Iterator[Batch]:
        yield from EvaluationBatches(file_source, torch.arange(60), WorkerContext(), batch_size=7)

    for batch in first():
        assert torch.equal(batch.images, array_source().images[:7].float() / 255)
        break


@pytest.mark.parametrize("world", [1, 3])
def test_anchors_carry_their_classes_weights(world: int) -> None:
    images = torch.zeros(40, 1, 4, 4, dtype=torch.uint8)
    source = ArraySource(images, torch.tensor([0] * 30 + [1] * 8 + [2] * 2))
    indices = torch.arange(2, 40)  # 28, 8 and 2 of them
    expected = {0: 38 / 3 / 28, 1: 38 / 3 / 8, 2: 38 / 3 / 2}
    for rank in range(world):
        context = WorkerContext(rank=rank, world_size=world)
        batches = batches_of(source, indices, DataConfig(balance="class_weights"), context, global_batch_size=9, seed=1)
        for step in batches.epoch(0):
            assert step.weights is not None
            assert step.weights.tolist() == pytest.approx([expected[label] for label in step.anchors.labels.tolist()])
        plain = batches_of(source, indices, DataConfig(balance="sampling"), context, global_batch_size=9, seed=1)
        assert next(plain.epoch(0)).weights is None
