"""Detection of misclassified images by class Gaussians over embeddings, and the threshold that rejects."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, pi
from typing import Any, Literal, Self
from zlib import crc32

import numpy as np
import numpy.typing as npt

Rule = Literal["likeliest", "predicted"]
Scores = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]

_RULES: tuple[Rule, ...] = ("likeliest", "predicted")  # by number in a file
_TABLES = ("classes", "means", "whitening", "log_determinants")
# The score of an image whose predicted class has no Gaussian: below every density, yet finite, as ROC curves need.
NO_GAUSSIAN = float(np.finfo(np.float32).min)
_ROWS_AT_ONCE = 2048
# Keeps the direction of an all-zero embedding defined (as zero); the learned metric has the same.
SMALLEST_SQUARE = 1e-20


def unit_rows(embeddings: Floats) -> Scores:
    """Embeddings (N, D) scaled to length one, in float64; all zeros stay so, as in the learned metric."""
    rows = embeddings.astype(np.float64)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True) + SMALLEST_SQUARE)


def digest_of(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Eight hex digits of the contents of arrays."""
    return f"{crc32(b''.join(arrays[name].tobytes() for name in sorted(arrays))):08x}"


@dataclass(frozen=True)
class Detector:
    """Gaussians by class, as plain arrays: classes (G,), int64, ascending, and their means (G, D), float64.

    `whitening` is the factor W of each precision matrix W Wᵀ: (G, D, D), (1, D, D) where tied, (G, D) where diagonal;
    `log_determinants` are log |det W| (G,). Embeddings are scaled to length one first if `normalize`. The score is the
    log density of the likeliest or of the predicted class, by `rule`.
    """

    classes: Integers
    means: Scores
    whitening: Scores
    log_determinants: Scores
    normalize: bool = True
    rule: Rule = "likeliest"

    def log_densities(self, embeddings: Floats) -> Scores:
        """Log densities (N, G) in nats of embeddings (N, D); ValueError if these are not finite or not of width D."""
        if embeddings.shape[1:] != self.means.shape[1:] or not np.isfinite(embeddings).all():
            raise ValueError(f"embeddings {embeddings.shape}: want finite ones, (N, {self.means.shape[1]})")
        densities = np.empty((len(embeddings), len(self.classes)))
        tied = len(self.whitening) == 1 and self.whitening.ndim == 3
        means = self.means @ self.whitening[0] if tied else self.means
        for start in range(0, len(embeddings), _ROWS_AT_ONCE):
            rows = embeddings[start : start + _ROWS_AT_ONCE]
            rows = unit_rows(rows) if self.normalize else rows.astype(np.float64)
            # Tied Gaussians whiten each row once, whatever the number of classes.
            rows = rows @ self.whitening[0] if tied else rows
            for place, mean in enumerate(means):
                white = rows - mean
                if not tied:
                    factor = self.whitening[place % len(self.whitening)]
                    white = white * factor if factor.ndim == 1 else white @ factor
                densities[start : start + len(rows), place] = -0.5 * (white**2).sum(1)
        return densities + self.log_determinants - 0.5 * self.means.shape[1] * log(2 * pi)

    def score(self, embeddings: Floats, predictions: Integers) -> Scores:
        """Log density (N,) under the class that `rule` names; one without a Gaussian scores below everything."""
        densities = self.log_densities(embeddings)
        if self.rule == "likeliest":
            return densities.max(1)
        places = np.searchsorted(self.classes, predictions).clip(max=len(self.classes) - 1)
        scores = densities[np.arange(len(densities)), places]
        return np.where(self.classes[places] == predictions, scores, NO_GAUSSIAN)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays of numbers, fit for a safetensors file."""
        settings = {"normalize": np.array([self.normalize], np.int64), "rule": np.array([_RULES.index(self.rule)])}
        return {name: getattr(self, name) for name in _TABLES} | settings

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """What :meth:`to_arrays` gave, as a detector; a missing array raises KeyError."""
        tables = {name: arrays[name] for name in _TABLES}
        return cls(**tables, normalize=bool(arrays["normalize"][0]), rule=_RULES[int(arrays["rule"][0])])


@dataclass(frozen=True)
class Rejector:
    """A detector that rejects images below a score; of correct validation images, a share at most."""

    detector: Detector
    threshold: float
    false_rejection_rate: float
    training_images: int
    validation_images: int

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays of numbers, fit for a safetensors file, or to cross processes."""
        rates = np.array([self.threshold, self.false_rejection_rate])
        counts = np.array([self.training_images, self.validation_images])
        return {**self.detector.to_arrays(), "rejection": rates, "images": counts}

    @property
    def digest(self) -> str:
        """Eight hex digits that tell rejectors apart."""
        return digest_of(self.to_arrays())

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """What :meth:`to_arrays` gave; a missing array raises KeyError."""
        threshold, rate = (float(value) for value in arrays["rejection"])
        training, validation = (int(value) for value in arrays["images"])
        return cls(Detector.from_arrays(arrays), threshold, rate, training, validation)
