"""What precedes the first step: split and batches, and checks of radii, step sizes, weights and disk space."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tla_service.config import RunConfig
from tla_service.data import Dataset, ImageSource, TrainingBatches, split_training
from tla_service.data.extra import ExtraImages, load_extra
from tla_service.data.order import StepOrder
from tla_service.data.sources import JoinedSource
from tla_service.errors import ConfigError, UnavailableError
from tla_service.models import Architecture
from tla_service.runtime import WorkerContext
from tla_service.training.own import check_own

_GB = 10**9
_SOME_IMAGES = 8  # that own functions are tried on


def split_and_check(
    config: RunConfig, dataset: Dataset, context: WorkerContext, architecture: Architecture
) -> tuple[Tensor, tuple[ImageSource, Tensor], TrainingBatches, dict[str, str]]:
    """Training rows, validation images, batches and facts on extra images; ConfigError if they do not fit the data."""
    train, validation = split_training(dataset, config.data.validation_fraction, config.seed)
    extra = load_extra(config.data, dataset, validation)
    batches = training_batches(config, dataset.train, train, context, extra)
    check_start(config, dataset, train, context.world_size, architecture)
    return train, validation, batches, {} if extra is None else extra.facts


def training_batches(
    config: RunConfig, source: ImageSource, rows: Tensor, context: WorkerContext, extra: ExtraImages | None = None
) -> TrainingBatches:
    """Batches of some of a source's images, and extra ones, with what the method's mining needs."""
    config.check_workers(context.world_size)
    mining = config.mining
    separate = config.mines_triplets and mining.pool == "separate"
    pool_size = mining.pool_size if separate else 0
    order = StepOrder(
        source.labels[rows],
        seed=config.seed,
        rank=context.rank,
        world_size=context.world_size,
        global_batch_size=config.training.global_batch_size - config.extra_per_step,
        pool_size=pool_size // context.world_size if mining.scope == "global" else pool_size,
        same_class_positives=separate and mining.positives != "own",
        balanced=config.data.balance == "sampling",
        extra=0 if extra is None else len(extra.rows),
        extra_per_step=config.extra_per_step,
    )
    images: ImageSource | JoinedSource = source
    if extra is not None:
        images, rows = JoinedSource(source, extra.source), torch.cat([rows, len(source) + extra.rows])
    views = {"augment_pool": mining.augment_pool, "second_view": config.loss.view_weight > 0}
    return TrainingBatches(images, rows, order, config.data, context, **views)


def check_start(config: RunConfig, dataset: Dataset, rows: Tensor, world_size: int, architecture: Architecture) -> None:
    """Raise ConfigError for a run that would fail later on the images that it trains on, at `rows` (N,), int64."""
    trouble = config.attack_trouble(dataset.image_shape)
    if trouble is not None:
        raise trouble
    if config.own_functions:
        with torch.random.fork_rng(devices=[]):
            network = architecture.build(len(dataset.class_names), dataset.image_shape)
            some = rows[torch.linspace(0, len(rows) - 1, _SOME_IMAGES).long()]
            images, labels = dataset.train.fetch(some).float() / 255, dataset.train.labels[some]
            check_own(config, network.eval(), images, labels, architecture.code)
    batch, extra = config.training.global_batch_size, config.extra_per_step
    steps = -(-len(rows) // (batch - extra))
    least = smallest_share(len(rows), steps, world_size, extra)
    if least == 1 and not config.training.freeze_batchnorm and _has_batchnorm(dataset, architecture):
        whom = "a worker" if world_size > 1 else "it"
        reason = f"{len(rows)} training images in {steps} steps leave {whom} with one image in some step"
        reason += f", too few for the BatchNorm of {config.model.name}"
        tried = range(steps, 0, -1) if not extra else ()
        enough = next((fewer for fewer in tried if smallest_share(len(rows), fewer, world_size) > 1), 0)
        remedy = f"use {-(-len(rows) // enough)}" if enough else "use fewer workers, or more images"
        raise ConfigError("training.global_batch_size", batch, reason, remedy)


def smallest_share(images: int, steps: int, world_size: int, extra_per_step: int = 0) -> int:
    """The fewest images that any worker gets in any step."""
    return (images // steps + extra_per_step) // world_size


def checkpoint_bytes(config: RunConfig, network: nn.Module) -> int:
    """Size of a checkpoint: current and best weights, average, weights in validation, and the optimizer's state."""
    floats = sum(tensor.numel() for tensor in network.state_dict().values())
    trained = sum(parameter.numel() for parameter in network.parameters())
    moments = 2 if config.optimizer.name != "sgd" else int(config.optimizer.momentum > 0)
    copies = 2 + (config.training.ema_decay is not None) + config.scaling.async_validation
    return 4 * (copies * floats + moments * trained)  # float32


def check_room(needs: Mapping[str, tuple[Path, int]]) -> None:
    """Raise UnavailableError if a filesystem is too small for the bytes to be added to its folders, by setting."""
    devices: dict[int, list[str]] = {}
    for field, (folder, _) in needs.items():
        devices.setdefault(_device(folder), []).append(field)
    for fields in devices.values():
        folder = _existing(needs[fields[0]][0])
        wanted, free = sum(needs[field][1] for field in fields), shutil.disk_usage(folder).free
        if wanted > free:
            parts = " and ".join(f"{needs[field][1] / _GB:.3g} GB for {field}" for field in fields)
            reason = f"its disk has {free / _GB:.3g} GB free, the run needs {parts}"
            remedy = f"free some, or point {' or '.join(fields)} to another disk"
            raise UnavailableError(fields[0], needs[fields[0]][0], reason, remedy)


def kept_need(folder: Path, checkpoint: int, kept: int) -> tuple[Path, int]:
    """A folder that keeps `kept` checkpoints of a size in bytes, and the bytes still to be written to it."""
    # A new checkpoint is written before an old one goes.
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return folder, max(checkpoint, (kept + 1) * checkpoint - there)


def _device(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _has_batchnorm(dataset: Dataset, architecture: Architecture) -> bool:
    with torch.random.fork_rng(devices=[]):
        network = architecture.build(len(dataset.class_names), dataset.image_shape)
    return any(isinstance(module, _BatchNorm) for module in network.modules())
