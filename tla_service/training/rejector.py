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
    train: tuple[ImageSource, Tensor],
    validation: tuple[ImageSource, Tensor],
    config: RunConfig,
    device: torch.device,
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a `Rejector`: class Gaussians of training images, and a threshold from validation images.

    Images are rows (N,) of a source. Empty, with a warning, where it cannot be fitted: a run must not fail for that.
    """

    def embedded(source: ImageSource, rows: Tensor) -> Embedded:
        alone = WorkerContext(device=device)
        return embed(network, EvaluationBatches(source, rows, alone, batch_size=config.evaluation.batch_size))

    settings, rows = config.detection, train[1]
    if len(rows) > settings.training_limit:
        rows = rows[torch.linspace(0, len(rows) - 1, settings.training_limit).long()]
    try:
        training, held_out = embedded(train[0], rows), embedded(*validation)
        detector = fit_detector(training, covariance=settings.covariance)
        scores = detector.score(held_out.embeddings, held_out.predictions)
        threshold = threshold_for(scores, held_out.correct, settings.false_rejection_rate)
    except ConfigError as error:
        _log.warning("The model is packaged without a detector of misclassified images: %s", error)
        return {}
    rejector = Rejector(detector, threshold, settings.false_rejection_rate, len(training), len(held_out))
    return rejector.to_arrays()
