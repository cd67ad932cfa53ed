"""The shape of the representation under attack: shift ratios r and r', and t-SNE pictures.

Sources: Mao et al. 2019, section 5.2 and Tables 2 and 3 (ratios); section 3, Figs. 1 and 2 (pictures).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tla_service.errors import ConfigError
from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.results import Shift
from tla_service.inference.detector import Floats, Integers, unit_rows
from tla_service.triplets import angular_distance, cosine_similarity

Values = npt.NDArray[np.float64]

_ROWS_AT_ONCE = 1024
# As in the authors' code. Their learning rate of 20 is 5 in scikit-learn, whose definition is larger by a factor of 4;
# whether their library honours the metric is not known.
_TSNE: dict[str, Any] = {
    "perplexity": 15.0, "max_iter": 5000, "n_iter_without_progress": 800, "learning_rate": 5.0, "metric": "cosine",
    "init": "random",
}  # fmt: skip


@dataclass(frozen=True)
class ShiftRatios:
    """Distances D = 1 - |cos| of adversarials to natural images, over those of natural images to each other (K,).

    r: mean D between adversarials misclassified as a class and its natural images, over the mean D of the unordered
    pairs of these; higher is better. r': the same with adversarials crafted from the class's own images; lower is
    better. NaN where nothing is misclassified as the class, or the denominator is undefined or zero.
    """

    r: Values
    r_prime: Values

    def at(self, epsilon: float) -> Shift:
        """The means, for a report."""
        left_out = [int(np.isnan(values).sum()) for values in (self.r, self.r_prime)]
        return Shift(epsilon, mean_of(self.r), mean_of(self.r_prime), *left_out)


@dataclass(frozen=True)
class Projection:
    """Points of natural (n, 2) and attacked (m, 2) images, true classes of the former, predictions on the latter."""

    natural: Floats
    adversarial: Floats
    labels: Integers
    predictions: Integers


def shift_ratios(natural: Embedded, adversarial: Embedded) -> ShiftRatios:
    """Measure r and r' (Mao et al. 2019, section 5.2) of K classes, the width of the logits.

    The paper does not say which natural images r compares with: here they are the test images given, as for r'. r
    counts all adversarials misclassified as a class, also those misclassified without an attack; r' counts all
    adversarials of a class, also those that the network gets right. ValueError without images, or if widths differ.
    """
    if not len(natural) or natural.embeddings.shape[1:] != adversarial.embeddings.shape[1:]:
        shapes = f"{natural.embeddings.shape} and {adversarial.embeddings.shape}"
        raise ValueError(f"natural and adversarial embeddings {shapes}: want images, of equal width")
    classes = natural.logits.shape[1]
    spread, taken, crafted = (np.full(classes, np.nan) for _ in range(3))
    predictions = adversarial.predictions
    for klass in range(classes):
        members = _doubles(natural.embeddings[natural.labels == klass])
        spread[klass] = _mean_distance(members, members, without_diagonal=True)
        misclassified = (predictions == klass) & (adversarial.labels != klass)
        taken[klass] = _mean_distance(_doubles(adversarial.embeddings[misclassified]), members)
        crafted[klass] = _mean_distance(_doubles(adversarial.embeddings[adversarial.labels == klass]), members)
    # A spread below rounding is none: the images coincide.
    usable = np.where(spread > 1e-12, spread, np.nan)
    return ShiftRatios(taken / usable, crafted / usable)


def mean_of(ratios: Values) -> float | None:
    """Mean over the classes that have a ratio; None without any."""
    found = ratios[~np.isnan(ratios)]
    return float(found.mean()) if len(found) else None


def select_class(
    natural: Embedded, adversarial: Embedded, klass: int, *, max_natural: int = 500, max_adversarial: int = 1000
) -> tuple[Embedded, Embedded]:
    """The images of Fig. 1: the first natural and attacked ones of a true class; ConfigError if there are none."""
    chosen = natural.subset(np.flatnonzero(natural.labels == klass)[:max_natural])
    attacked = adversarial.subset(np.flatnonzero(adversarial.labels == klass)[:max_adversarial])
    if not len(chosen) or not len(attacked):
        raise ConfigError("class", klass, "has no natural or no attacked images", "choose another class")
    return chosen, attacked


def select_pair(
    natural: Embedded, adversarial: Embedded, source: int, target: int, *, max_natural: int = 200
) -> tuple[Embedded, Embedded]:
    """The images of Fig. 2: natural ones of two classes, and attacked ones of `source` taken for `target`, if any.

    Raises ConfigError if there are no natural images of one of the classes.
    """
    chosen = natural.subset(np.flatnonzero(np.isin(natural.labels, (source, target)))[:max_natural])
    for klass in (source, target):
        if not (chosen.labels == klass).any():
            raise ConfigError("class", klass, "has no natural images among those to draw", "choose another pair")
    taken = (adversarial.labels == source) & (adversarial.predictions == target)
    return chosen, adversarial.subset(np.flatnonzero(taken))


def project(natural: Embedded, adversarial: Embedded, *, seed: int, **settings: Any) -> Projection:
    """Project natural and attacked embeddings into the plane together, by t-SNE; ConfigError if they are too few.

    The authors project all images, then select; 20,000 points take the better part of an hour. `settings` replace the
    authors' for :class:`sklearn.manifold.TSNE`.
    """
    from sklearn.manifold import TSNE

    rows = unit_rows(np.concatenate([natural.embeddings, adversarial.embeddings])).astype(np.float32)
    chosen = _TSNE | settings
    if len(rows) <= chosen["perplexity"]:
        reason = f"not below the {len(rows)} images to draw"
        raise ConfigError("perplexity", chosen["perplexity"], reason, "draw more images, or lower it")
    points = TSNE(n_components=2, random_state=seed, **chosen).fit_transform(rows)
    return Projection(points[: len(natural)], points[len(natural) :], natural.labels, adversarial.predictions)


def _doubles(embeddings: Floats) -> torch.Tensor:
    """In float64: a tight cluster's distances are differences of numbers near one."""
    return torch.from_numpy(embeddings.astype(np.float64))


def _mean_distance(first: torch.Tensor, second: torch.Tensor, *, without_diagonal: bool = False) -> float:
    """Mean D of all pairs of two sets of embeddings, row i with row i left out where asked for; NaN without pairs."""
    pairs = len(first) * len(second) - (len(first) if without_diagonal else 0)
    if pairs <= 0:
        return float("nan")
    total = sum(float((1 - cosine_similarity(part, second).abs()).sum()) for part in first.split(_ROWS_AT_ONCE))
    if without_diagonal:
        total -= float(angular_distance(first, second).sum())
    return total / pairs
