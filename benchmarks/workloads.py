"""The measured networks, batches and attacks, and a complete training step of each."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tla_service.config import RunConfig
from tla_service.data import ArraySource, StepBatch, TrainingBatches
from tla_service.models import build_model
from tla_service.runtime import WorkerContext
from tla_service.training.adversary import Adversary
from tla_service.training.meter import Meter
from tla_service.training.optimizer import build_optimizer
from tla_service.training.precheck import training_batches
from tla_service.training.step import TrainingStep

Changes = dict[str, Any]
CLASSES = 10
_IMAGES = 4096


def merged(base: Changes, changes: Changes) -> Changes:
    """Configuration changes, section by section."""
    both = dict(base)
    for key, value in changes.items():
        both[key] = {**both.get(key, {}), **value} if isinstance(value, dict) else value
    return both


@dataclass(frozen=True)
class Workload:
    """A network with a kind of images and an attack.

    Attributes:
        model: Name of the network.
        image_shape: (C, H, W).
        batch_size: Images per step.
        num_steps: K, the attack's steps.
        epsilon: Radius, L-infinity.
        step_size: Length of one attack step.
        settings: More sections of the run's configuration.
    """

    model: str
    image_shape: tuple[int, int, int]
    batch_size: int
    num_steps: int
    epsilon: float
    step_size: float
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Network, K and batch."""
        return f"{self.model}, K = {self.num_steps}, batch {self.batch_size}"

    @property
    def has_all_stages(self) -> bool:
        """Whether all stages measure it; with few or many attack steps, only the one of whole steps does."""
        return 7 <= self.num_steps <= 10

    def config(self, **changes: Any) -> RunConfig:
        """The run, in the cheap mode (`pool: batch`) unless changed; sections are merged."""
        fields: dict[str, Any] = {
            "data": {"name": "cifar10", "root": "synthetic"},
            "model": {"name": self.model},
            "attack": {"epsilon": self.epsilon, "step_size": self.step_size, "num_steps": self.num_steps},
            "training": {"global_batch_size": self.batch_size},
        }
        return RunConfig.model_validate(merged(merged(fields, self.settings), changes))


_ADAM = {"optimizer": {"name": "adam", "learning_rate": 0.0001}}
_SGD = {"optimizer": {"name": "sgd", "learning_rate": 0.01}, "data": {"crop_padding": 4, "flip": True}}
CPU_WORKLOADS = {
    "small_cnn": Workload("small_cnn", (1, 28, 28), 256, 7, 0.3, 0.075, _ADAM),
    "small_cnn_4": Workload("small_cnn", (1, 28, 28), 256, 4, 0.3, 0.125, _ADAM),  # as in the tuned MNIST table
    "small_cnn_40": Workload("small_cnn", (1, 28, 28), 128, 40, 0.3, 0.01, _ADAM),
    "mnist_cnn": Workload("mnist_cnn", (1, 28, 28), 16, 7, 0.3, 0.075, _ADAM),
    "resnet_18": Workload("torchvision:resnet18", (3, 32, 32), 32, 7, 8 / 255, 2 / 255, _SGD),
}
GPU_WORKLOADS = {
    "preact_resnet_18": Workload("preact_resnet_18", (3, 32, 32), 512, 10, 8 / 255, 2 / 255, _SGD),
    "wrn_32_10": Workload("wrn_32_10", (3, 32, 32), 256, 7, 8 / 255, 2 / 255, _SGD),
}


class FullStep:
    """Everything a training step does, on synthetic uint8 images: data, augmentation, attack, update, meter.

    Args:
        workload: What.
        context: Where.
        changes: Of the configuration.
    """

    def __init__(self, workload: Workload, context: WorkerContext, **changes: Any) -> None:
        self.config = workload.config(**changes).on_device(has_gpu=context.device.type == "cuda")
        self.context = context
        torch.manual_seed(0)
        layout = torch.channels_last if self.config.training.channels_last else torch.contiguous_format
        network = build_model(workload.model, CLASSES, workload.image_shape, self.config.model.normalization)
        self.network = network.to(context.device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.network, self.config)
        self.step = TrainingStep(self.network, self.config, context)
        self.adversary.prepare((workload.batch_size, *workload.image_shape))
        self.meter = Meter(context)
        self.batches = _synthetic_batches(workload, self.config, context)
        # Not a method: a generator that holds the step would keep it, and its graphs, until the next collection.
        self._upcoming = _endless(self.batches)
        self._count = 0

    @property
    def adversary(self) -> Adversary:
        """The training attack."""
        return self.step.adversary

    def next_batch(self) -> StepBatch:
        """The next batch, read and augmented."""
        return next(self._upcoming)

    def __call__(self) -> None:
        """One step."""
        batch = self.next_batch()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(self.step.backward(batch, self._count))
        self.optimizer.step()
        self._count += 1


def _endless(batches: TrainingBatches) -> Iterator[StepBatch]:
    for epoch in itertools.count():
        yield from batches.epoch(epoch)


def _synthetic_batches(workload: Workload, config: RunConfig, context: WorkerContext) -> TrainingBatches:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_IMAGES, *workload.image_shape), generator=draws, dtype=torch.uint8)
    source = ArraySource(images, torch.arange(_IMAGES) % CLASSES)
    return training_batches(config, source, torch.arange(_IMAGES), context)
