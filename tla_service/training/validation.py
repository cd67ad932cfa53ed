"""Accuracy during a run: by the workers together, or by another process in their place while they train on."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tla_service.attacks import Attack
from tla_service.config import RunConfig
from tla_service.config.adversary import EvaluationAttack
from tla_service.data import Dataset, EvaluationBatches, ImageSource
from tla_service.evaluation.suite import accuracies, count_right, evaluation_attack, measure_accuracy
from tla_service.runtime import WorkerContext, failing_together, gather_objects, mixed_seed

POLL_SECONDS = 0.1  # between two looks at a validation that training waits for
TELL_SECONDS = 60.0  # of waiting, after which the log says so


class Validator(Protocol):
    """Measures the validation images beside training, for one set of weights at a time; used on rank 0 only."""

    def submit(self, weights: Mapping[str, Tensor]) -> None:
        """Begin; returns at once."""

    def poll(self) -> dict[str, float] | None:
        """The accuracies once they are known, without waiting; raises what the measurement raised."""


def taken(
    validator: Validator, context: WorkerContext, tell: Callable[..., None], waits: str, *, wait: bool
) -> dict[str, float] | None:
    """What rank 0's validator has measured, on every worker; None if it is not known yet and none is to `wait`.

    After a minute `tell` gets the message `waits`.
    """
    began, told = time.monotonic(), False
    while True:
        with failing_together(context):
            own = validator.poll() if context.is_main else None
        # Asked together, again and again: a worker that waited alone would seem hung.
        measured = gather_objects(own, context)[0]
        if measured is not None or not wait:
            return measured
        if not told and time.monotonic() - began > TELL_SECONDS:
            told = True
            tell(event="waiting", message=f"{waits}: it is slow, or the cluster has no room for it")
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class ImageSet:
    """Images (rows of a source) whose accuracy is measured, clean and under each attack."""

    config: RunConfig
    source: ImageSource
    rows: Tensor
    attacks: Mapping[str, Attack]

    @classmethod
    def validation(cls, config: RunConfig, images: tuple[ImageSource, Tensor], code: bytes | None) -> "ImageSet":
        """The validation images, at most `evaluation.validation_limit`."""
        (source, rows), evaluation = images, config.evaluation
        if evaluation.validation_limit is not None and evaluation.validation_limit < len(rows):
            rows = rows[torch.linspace(0, len(rows) - 1, evaluation.validation_limit).long()]
        settings = {"validation": evaluation.validation}
        if evaluation.validation_margin:
            settings["validation_margin"] = evaluation.validation.model_copy(update={"kind": "cw"})
        return cls(config, source, rows, _attacks(config, "evaluation", settings, code))

    @classmethod
    def test(cls, config: RunConfig, dataset: Dataset, code: bytes | None) -> "ImageSet":
        """The test images."""
        attacks = _attacks(config, "evaluation.test", config.evaluation.test, code)
        return cls(config, dataset.test, torch.arange(len(dataset.test)), attacks)

    def measure(self, network: nn.Module, context: WorkerContext) -> dict[str, float]:
        """By all workers together; see `suite.measure_accuracy`."""
        return measure_accuracy(network, self._batches(context), self.attacks, context, self._seed)

    def measure_for(self, workers: int, network: nn.Module, device: torch.device) -> dict[str, float]:
        """What that many workers would measure together, here: random starts depend on a worker's rank."""
        shares = [WorkerContext(rank, world_size=workers, device=device) for rank in range(workers)]
        counts = [count_right(network, self._batches(each), self.attacks, each, self._seed) for each in shares]
        return accuracies(torch.stack(counts).sum(0), self.attacks)

    @property
    def _seed(self) -> int:
        return mixed_seed(self.config.seed, 3)

    def _batches(self, context: WorkerContext) -> EvaluationBatches:
        return EvaluationBatches(self.source, self.rows, context, batch_size=self.config.evaluation.batch_size)


def _attacks(
    config: RunConfig, section: str, settings: Mapping[str, EvaluationAttack], code: bytes | None
) -> dict[str, Attack]:
    return {
        name: evaluation_attack(attack, config.attack, config.data.name, f"{section}.{name}", code)
        for name, attack in settings.items()
    }
