"""Beyond the ball: accuracy under common corruptions, calibration, and other norms side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch

from tla_service.attacks import is_right
from tla_service.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.results import BoolArray, Share, share_of
from tla_service.evaluation.shards import Arrays, Shard, as_pixels, evaluating, float32, logits_of

BINS = 15


@dataclass(frozen=True)
class Corruptions:
    """Accuracy by corruption, at severities 1 to 5, and on the same images when clean.

    `mean_error` is the mean corruption error, over all corruptions and severities, with a normal 95% interval of the
    mean over images. It is not divided by the error of a reference network: AlexNet's, by which ImageNet-C does that,
    is not defined for other data. RobustBench reports 1 - `mean_error`.
    """

    images: int
    clean: Share
    mean_error: float | None
    low: float
    high: float
    accuracy: dict[str, tuple[Share, ...]]

    @property
    def by_name(self) -> dict[str, float]:
        """Mean accuracy of each corruption over its severities, the lowest first."""
        means = {name: sum(each.estimate or 0.0 for each in row) / len(row) for name, row in self.accuracy.items()}
        return dict(sorted(means.items(), key=lambda item: item[1]))


@dataclass(frozen=True)
class ConfidenceBin:
    """Images whose confidence is in (low, high]: their mean confidence (None: no image) and their accuracy."""

    low: float
    high: float
    confidence: float | None
    accuracy: Share


@dataclass(frozen=True)
class Calibration:
    """How far the confidence, the largest class probability, is from the accuracy.

    `ece` is the expected calibration error over `BINS` bins of equal width (Guo et al. 2017, eq. 3), `nll` the mean
    negative log likelihood, `brier` the sum of squared errors over the classes, in [0, 2].
    """

    ece: float
    confidence: float
    accuracy: Share
    nll: float
    brier: float
    bins: tuple[ConfidenceBin, ...]


@dataclass(frozen=True)
class NormRow:
    """Accuracy within a radius of one norm, on images whose clean accuracy is `clean`.

    L0 radii count changed values of a pixel's channels. `source` says where the radius is from, `attack` what was run.
    """

    norm: Literal["linf", "l2", "l1", "l0"]
    epsilon: float
    source: str
    attack: str
    accuracy: Share
    clean: Share


@dataclass(frozen=True)
class CorruptionMeasurement:
    """Whether each image is classified correctly: merged to (N, 76), clean first, then by corruption and severity."""

    seed: int
    batch_size: int

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        images, logits_fn = shard.images.cpu().numpy(), logits_of(shard.network)
        versions = [None, *product(CORRUPTIONS, SEVERITIES)]
        correct = np.zeros((len(images), len(versions)), dtype=bool)
        with torch.no_grad(), evaluating(shard.network), float32(shard.device):
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                truth = shard.labels[part].to(shard.device)
                for place, version in enumerate(versions):
                    seen = shard.images[part]
                    if version is not None:
                        seen = torch.from_numpy(corrupt(images[part], *version, shard.rows[part], self.seed))
                    pixels = as_pixels(seen, shard.device)
                    correct[part, place] = is_right(logits_fn(pixels), truth).cpu().numpy()
        return {"correct": correct}

    def merge(self, parts: Sequence[Arrays]) -> BoolArray:
        """See `Measurement`."""
        return np.concatenate([part["correct"] for part in parts])


def summarise_corruptions(correct: BoolArray) -> Corruptions:
    """Accuracies and mean corruption error from what :class:`CorruptionMeasurement` found (N, 76)."""
    count, corrupted = len(correct), correct[:, 1:]
    errors = 1 - corrupted.mean(axis=1)
    mean = float(errors.mean()) if count else None
    # Outcomes of one image depend on each other, so that images, not outcomes, are the sample.
    margin = 1.96 * float(errors.std(ddof=1)) / math.sqrt(count) if count > 1 else 1.0
    shares = [share_of(column) for column in corrupted.T]
    rows = range(0, len(shares), len(SEVERITIES))
    return Corruptions(
        images=count,
        clean=share_of(correct[:, 0]),
        mean_error=mean,
        low=max(0.0, (mean or 0.0) - margin),
        high=min(1.0, (mean or 0.0) + margin),
        accuracy={name: tuple(shares[at : at + len(SEVERITIES)]) for name, at in zip(CORRUPTIONS, rows, strict=True)},
    )


def calibrate(embedded: Embedded) -> Calibration:
    """Calibration of a network on images, one at least."""
    from scipy.special import log_softmax, softmax
    from sklearn.metrics import brier_score_loss

    classes, logits = np.arange(embedded.logits.shape[1]), embedded.logits.astype(np.float64)
    # Of the logits: a probability that has vanished says no more how small it was.
    of_labels = np.take_along_axis(log_softmax(logits, axis=1), embedded.labels[:, None], axis=1)
    confidence, correct = embedded.max_softmax, embedded.correct
    edges = np.linspace(0, 1, BINS + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    bins = []
    for number in range(BINS):
        inside = place == number
        mean = float(confidence[inside].mean()) if inside.any() else None
        bins.append(ConfidenceBin(float(edges[number]), float(edges[number + 1]), mean, share_of(correct[inside])))
    gaps = [each.accuracy.images * abs((each.accuracy.estimate or 0.0) - (each.confidence or 0.0)) for each in bins]
    return Calibration(
        ece=sum(gaps) / len(embedded),
        confidence=float(confidence.mean()),
        accuracy=share_of(correct),
        nll=-float(of_labels.mean()),
        brier=float(brier_score_loss(embedded.labels, softmax(logits, axis=1), labels=classes, scale_by_half=False)),
        bins=tuple(bins),
    )
