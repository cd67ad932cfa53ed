"""Validation as a Ray task of its own, while the workers train on.

Not by Ray Train's `ValidationConfig`: that validates checkpoints that go through `ray.train.report`, which a run does
without (see `reporter.RayReporter`), and puts the result into Ray's record only, where no worker sees it.
"""

import os
from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from tla_service.config import RunConfig
from tla_service.data import load_dataset, split_training
from tla_service.errors import UserError
from tla_service.models import Architecture
from tla_service.runtime import keep_freed_memory
from tla_service.training.adversary import layout_of
from tla_service.training.validation import ImageSet


class RayValidator:
    """Measures on resources like those of one worker; a task that loses its node starts again on another."""

    def __init__(self, config: RunConfig, code: Any, workers: int, *, use_gpu: bool) -> None:
        scaling = config.scaling
        self._task = ray.remote(_validate).options(
            num_cpus=scaling.cpus_per_worker,
            num_gpus=scaling.gpus_per_worker if use_gpu else 0,
            scheduling_strategy="DEFAULT",  # not within the resources of the workers
            max_retries=-1,  # of a lost node or process; what the task itself raises is not retried
        )
        self._fixed = config, code, workers
        self._running: Any = None

    def submit(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with weights on the CPU."""
        self._running = self._task.remote(*self._fixed, dict(weights))

    def poll(self) -> dict[str, float] | None:
        """The accuracies, once; None while they are not known."""
        if not ray.wait([self._running], timeout=0)[0]:
            return None
        try:
            measured: dict[str, float] = ray.get(self._running)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise
        return measured


def _validate(config: RunConfig, code: bytes | None, workers: int, weights: dict[str, Tensor]) -> dict[str, float]:
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    config = config.on_device(has_gpu=device.type == "cuda")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        if config.speed.keep_freed_memory:
            keep_freed_memory()
    dataset = load_dataset(config.data)
    _, validation = split_training(dataset, config.data.validation_fraction, config.seed)
    network = Architecture.of(config.model, code).build(len(dataset.class_names), dataset.image_shape)
    network.load_state_dict(weights)
    network = network.to(device, memory_format=layout_of(config))  # type: ignore[call-overload]
    return ImageSet.validation(config, validation, code).measure_for(workers, network, device)
