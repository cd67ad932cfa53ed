"""The detector of a registered model: fitted to training images, with a threshold from validation images."""

import logging
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from tla_service.config import RunConfig
from tla_service.data import EvaluationBatches
from tla_service.data.sources import ImageSource
from tla_service.errors import ConfigError
from tla_service.evaluation.detection import fit_detector, threshold_for
from tla_service.evaluation.embedding import Embedded, embed
from tla_service.inference.detector import Rejector
from tla_service.runtime import WorkerContext

_log = logging.getLogger(__name__)


def fit_rejector(
    network: nn.Module,
    source: ImageSource,
    train_rows: Tensor,
    validation_rows: Tensor,
    config: RunConfig,
    device: torch.device,
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a `Rejector`: class Gaussians of training images, (N,) rows of `source`, and a threshold.

    None, with a warning, where it cannot be fitted: a run must not fail for lack of one.
    """

    def embedded(rows: Tensor) -> Embedded:
        alone = WorkerContext(device=device)
        return embed(network, EvaluationBatches(source, rows, alone, batch_size=config.evaluation.batch_size))

    settings = config.detection
    if len(train_rows) > settings.training_limit:
        train_rows = train_rows[torch.linspace(0, len(train_rows) - 1, settings.training_limit).long()]
    training, validation = embedded(train_rows), embedded(validation_rows)
    try:
        detector = fit_detector(training, covariance=settings.covariance)
        threshold = threshold_for(
            detector.score(validation.embeddings, validation.predictions),
            validation.correct,
            settings.false_rejection_rate,
        )
    except ConfigError as error:
        _log.warning("The model is packaged without a detector of misclassified images: %s", error)
        return {}
    rejector = Rejector(detector, threshold, settings.false_rejection_rate, len(training), len(validation))
    return rejector.to_arrays()
