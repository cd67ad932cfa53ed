"""What is known of a run before its first step."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from tests.data.conftest import batches_of
from tla_service.config import RunConfig
from tla_service.data import ArraySource, Dataset, load_dataset
from tla_service.errors import ConfigError, UnavailableError
from tla_service.models import Architecture, build_model
from tla_service.runtime import WorkerContext
from tla_service.training.checkpoint import TrainingState, cpu_weights, save_checkpoint
from tla_service.training.optimizer import build_optimizer
from tla_service.training.precheck import (
    check_room,
    check_start,
    checkpoint_bytes,
    kept_need,
    smallest_share,
    training_batches,
)


def images(count: int) -> Dataset:
    """Two classes of 3x32x32 images; ResNet-18 has 1x1 maps at its end."""
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    source = ArraySource(pixels, torch.arange(count) % 2)
    gate = torch.zeros(count, dtype=torch.bool)
    return Dataset("image_folder", source, source, gate, ("cat", "dog"), "f")


def run_config(batch: int, **fields: object) -> RunConfig:
    values = {"model": {"name": "torchvision:resnet18"}, "training": {"global_batch_size": batch}}
    return RunConfig.model_validate({**values, **fields})


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch", [6, 7, 8, 13])
def test_the_smallest_share_is_the_smallest_that_any_worker_gets(batch: int, world_size: int) -> None:
    config = RunConfig()
    for count in range(world_size, 40):
        source = ArraySource(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.arange(count) % 2)
        steps = -(-count // batch)
        if count < steps * world_size:
            continue
        least = min(
            len(step.anchors.labels)
            for rank in range(world_size)
            for step in batches_of(
                source,
                torch.arange(count),
                config.data,
                WorkerContext(rank=rank, world_size=world_size),
                global_batch_size=batch,
                seed=0,
            ).epoch(0)
        )
        assert smallest_share(count, steps, world_size) == least


def start(config: RunConfig, rows: int, workers: int) -> None:
    check_start(config, images(9), torch.arange(rows), workers, Architecture.of(config.model))


def test_one_image_in_a_step_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        start(run_config(2), 9, 1)
    assert str(caught.value) == (
        "training.global_batch_size=2: 9 training images in 5 steps leave it with one image in some step, too few "
        "for the BatchNorm of torchvision:resnet18; use 3"
    )
    start(run_config(3), 9, 1)


def test_a_worker_s_share_of_one_image_is_refused() -> None:
    config = run_config(4, method="at")
    start(config, 8, 2)
    with pytest.raises(ConfigError, match=r"9 training images in 3 steps leave a worker with one image.*; use 5"):
        start(config, 9, 2)
    start(run_config(5, method="at"), 9, 2)
    with pytest.raises(ConfigError, match="use fewer workers, or more images"):
        start(config, 3, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": {"name": "small_cnn"}},
        {
            "model": {"name": "torchvision:resnet18", "pretrained": "weights.pt"},
            "training": {"global_batch_size": 2, "freeze_batchnorm": True},
        },
    ],
    ids=["none", "frozen"],
)
def test_without_batch_statistics_one_image_trains(fields: dict[str, object]) -> None:
    start(run_config(2, method="natural", **fields), 9, 1)


def test_the_check_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(ConfigError):
        start(run_config(2, method="at"), 9, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("optimizer", [{"name": "sgd"}, {"name": "sgd", "momentum": 0}, {"name": "adam"}])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_checkpoint_is_as_large_as_estimated(tmp_path: Path, optimizer: dict[str, object], ema: float | None) -> None:
    config = RunConfig.model_validate({"optimizer": optimizer, "training": {"ema_decay": ema}})
    dataset = load_dataset(config.data)
    network = build_model(config.model.name, 10, dataset.image_shape)
    state = TrainingState(network, build_optimizer(network, config), AveragedModel(network) if ema else None)
    network(torch.rand(2, 1, 8, 8)).logits.sum().backward()
    state.optimizer.step()
    state.best_weights = cpu_weights(network)
    save_checkpoint(tmp_path / "c", state, config, {})
    size = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    assert size == pytest.approx(checkpoint_bytes(config, network), rel=0.05)


def test_a_disk_without_room_is_refused_with_the_figures(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_room({"output": (tmp_path / "not" / "there", 1000)})
    with pytest.raises(UnavailableError) as caught:
        check_room({"output": (tmp_path / "not" / "there", 2 * free), "TMPDIR": (tmp_path, 3 * free)})
    said = str(caught.value)
    assert said.startswith(f"output={tmp_path}/not/there: its disk has ")
    assert "GB for output and" in said
    assert said.endswith("GB for TMPDIR; free some, or point output or TMPDIR to another disk")
    # Half of what is free each is too much together, but not alone.
    halves = {name: (tmp_path, int(0.6 * free)) for name in ("output", "TMPDIR")}
    check_room({"output": halves["output"]})
    with pytest.raises(UnavailableError):
        check_room(halves)


def test_checkpoints_that_are_there_need_no_more_room(tmp_path: Path) -> None:
    assert kept_need(tmp_path / "none", 100, 2) == (tmp_path / "none", 300)
    for number in range(2):
        (tmp_path / f"step-{number}").mkdir()
        (tmp_path / f"step-{number}" / "model.safetensors").write_bytes(b"x" * 100)
    assert kept_need(tmp_path, 100, 2) == (tmp_path, 100)
    (tmp_path / "more").write_bytes(b"x" * 500)
    assert kept_need(tmp_path, 100, 2) == (tmp_path, 100)


def test_balanced_sampling_reaches_the_batches() -> None:
    source = ArraySource(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), torch.tensor([0] * 96 + [1] * 4))
    shares = {}
    for balance in ("none", "sampling", "class_weights"):
        config = RunConfig.model_validate({"data": {"balance": balance}, "training": {"global_batch_size": 20}})
        batches = training_batches(config, source, torch.arange(100), WorkerContext())
        labels = torch.cat([step.anchors.labels for epoch in range(5) for step in batches.epoch(epoch)])
        shares[balance] = float(labels.float().mean())
    assert shares["none"] == shares["class_weights"] == pytest.approx(0.04)
    assert 0.42 < shares["sampling"] < 0.58
