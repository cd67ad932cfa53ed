"""The shape of the representation under attack: shift ratios r and r', and t-SNE pictures.

Sources: Mao et al. 2019, section 5.2 and Tables 2 and 3 (ratios); section 3, Figs. 1 and 2 (pictures).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tla_service.errors import ConfigError
from tla_service.evaluation.embedding import Embedded
from tla_service.inference.detector import Floats, Integers, unit_rows
from tla_service.triplets import angular_distance, cosine_similarity

Values = npt.NDArray[np.float64]

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class ShiftRatios:
    """How far adversarials lie from natural images, against how far these lie from each other; D = 1 - |cos|.

    Attributes:
        r: Mean over classes of `r_by_class`, NaN if none has one. Higher is better: images that the network mistakes
            for a class stay away from it.
        r_prime: Mean over classes of `r_prime_by_class`. Lower is better: attacked images stay near their own class.
        r_by_class: D between adversarials misclassified as the class and its natural images, over `natural` (K,);
            NaN where the class is left out.
        r_prime_by_class: The same with adversarials crafted from the class's own images (K,).
        natural: Mean D of the unordered pairs of a class's natural images (K,); NaN with fewer than two images.
        misclassified_as: Adversarials misclassified as each class (K,).
        left_out_of_r: Classes that `r` does without: nothing is misclassified as them, or `natural` is NaN or zero.
        left_out_of_r_prime: Classes that `r_prime` does without.
    """

    r: float
    r_prime: float
    r_by_class: Values
    r_prime_by_class: Values
    natural: Values
    misclassified_as: Integers
    left_out_of_r: int
    left_out_of_r_prime: int


@dataclass(frozen=True)
class TsneSettings:
    """Settings of t-SNE; what the authors' code sets carries over.

    Attributes:
        perplexity: Effective number of neighbours; below the number of points.
        max_iter: Iterations.
        n_iter_without_progress: Iterations without progress before it stops.
        learning_rate: The authors' 20 is 5 in scikit-learn, whose definition is larger by a factor of 4.
        metric: Their `cosine`; whether their library honours it is not known.
        init: Where points start; theirs start at random.
    """

    perplexity: float = 15.0
    max_iter: int = 5000
    n_iter_without_progress: int = 800
    learning_rate: float | Literal["auto"] = 5.0
    metric: Literal["cosine", "euclidean"] = "cosine"
    init: Literal["random", "pca"] = "random"


@dataclass(frozen=True)
class Selection:
    """Which images a picture shows.

    Attributes:
        natural: Rows of the natural images (n,).
        adversarial: Rows of the attacked images (m,).
    """

    natural: Integers
    adversarial: Integers


@dataclass(frozen=True)
class Projection:
    """Natural and attacked images in the plane, projected together.

    Attributes:
        natural: Points (n, 2).
        adversarial: Points (m, 2).
        natural_labels: True classes of the natural images (n,).
        adversarial_labels: True classes of the attacked images (m,).
        adversarial_predictions: What the network says of the attacked images (m,).
    """

    natural: Floats
    adversarial: Floats
    natural_labels: Integers
    adversarial_labels: Integers
    adversarial_predictions: Integers


def shift_ratios(natural: Embedded, adversarial: Embedded, *, own_image: bool = True) -> ShiftRatios:
    """Measure r and r' (Mao et al. 2019, section 5.2), every class with the same weight.

    The paper does not say which natural images r compares with: here they are the ones given, test images, as for r'.
    All adversarials misclassified as a class count for r, also of images that are misclassified without an attack;
    all adversarials of a class count for r', also those that the network gets right.

    Args:
        natural: Embedded natural images.
        adversarial: Embedded attacked images; the same images row by row where `own_image` is False.
        own_image: Whether r' compares an adversarial with its own natural image too, one pair in N of its class.

    Returns:
        The ratios, over K classes, the width of the logits. Classes without a ratio are left out and counted.

    Raises:
        ValueError: There is no image, widths differ, or `own_image` is False and the images are not the same.
    """
    if not len(natural) or natural.embeddings.shape[1:] != adversarial.embeddings.shape[1:]:
        shapes = f"{natural.embeddings.shape} and {adversarial.embeddings.shape}"
        raise ValueError(f"natural and adversarial embeddings {shapes}: want images, of equal width")
    if not own_image and not np.array_equal(natural.labels, adversarial.labels):
        raise ValueError("natural and adversarial images differ in their labels: give the same images in one order")
    classes = natural.logits.shape[1]
    spread, mistaken, crafted = (np.full(classes, np.nan) for _ in range(3))
    predictions = adversarial.predictions
    as_class = (predictions[None] == np.arange(classes)[:, None]) & (predictions != adversarial.labels)[None]
    for klass in range(classes):
        members = _doubles(natural.embeddings[natural.labels == klass])
        own = _doubles(adversarial.embeddings[adversarial.labels == klass])
        spread[klass] = _mean_distance(members, members, without_diagonal=True)
        mistaken[klass] = _mean_distance(_doubles(adversarial.embeddings[as_class[klass]]), members)
        crafted[klass] = _mean_distance(own, members, without_diagonal=not own_image)
    # A spread below rounding is none: the images coincide.
    usable = np.where(spread > 1e-12, spread, np.nan)
    r, r_prime = mistaken / usable, crafted / usable
    return ShiftRatios(
        _mean(r), _mean(r_prime), r, r_prime, spread, as_class.sum(1), *(int(np.isnan(x).sum()) for x in (r, r_prime))
    )


def select_class(
    natural: Embedded, adversarial: Embedded, klass: int, *, max_natural: int = 500, max_adversarial: int = 1000
) -> Selection:
    """Choose the images of Fig. 1: the first natural and the first attacked images of one true class.

    Raises:
        ConfigError: There are no natural or no attacked images of the class.
    """
    chosen = Selection(
        np.flatnonzero(natural.labels == klass)[:max_natural],
        np.flatnonzero(adversarial.labels == klass)[:max_adversarial],
    )
    if not len(chosen.natural) or not len(chosen.adversarial):
        raise ConfigError("class", klass, "has no natural or no attacked images", "choose another class")
    return chosen


def select_pair(
    natural: Embedded, adversarial: Embedded, source: int, target: int, *, max_natural: int = 200
) -> Selection:
    """Choose the images of Fig. 2: natural ones of two classes, and attacked ones of `source` taken for `target`.

    Args:
        natural: Embedded natural images.
        adversarial: Embedded attacked images.
        source: True class of the attacked images.
        target: What the network takes them for.
        max_natural: Natural images of both classes together; the first in order.

    Returns:
        The rows; there may be no attacked ones, where no attack leads from `source` to `target`.

    Raises:
        ConfigError: There are no natural images of one of the classes.
    """
    chosen = np.flatnonzero(np.isin(natural.labels, (source, target)))[:max_natural]
    for klass in (source, target):
        if not (natural.labels[chosen] == klass).any():
            raise ConfigError("class", klass, "has no natural images among those to draw", "choose another pair")
    taken = np.flatnonzero((adversarial.labels == source) & (adversarial.predictions == target))
    return Selection(chosen, taken)


def project(
    natural: Embedded,
    adversarial: Embedded,
    selection: Selection,
    *,
    seed: int,
    whole: bool = False,
    settings: TsneSettings | None = None,
) -> Projection:
    """Project natural and attacked embeddings into the plane together, by t-SNE.

    Args:
        natural: Embedded natural images.
        adversarial: Embedded attacked images.
        selection: Which to show.
        seed: Fixes the starting points.
        whole: Project all images, then select, as the authors do: the classes around shape the picture too, but
            20,000 points take the better part of an hour. The default projects the selected images only.
        settings: t-SNE's own; default: the authors'.

    Returns:
        The points of the selected images.

    Raises:
        ConfigError: There are too few points for the perplexity.
    """
    from sklearn.manifold import TSNE

    shown = natural.subset(selection.natural), adversarial.subset(selection.adversarial)
    first, second = (natural, adversarial) if whole else shown
    rows = unit_rows(np.concatenate([first.embeddings, second.embeddings])).astype(np.float32)
    chosen = settings or TsneSettings()
    if len(rows) <= chosen.perplexity:
        reason = f"not below the {len(rows)} images to draw"
        raise ConfigError("perplexity", chosen.perplexity, reason, "draw more images, or lower it")
    points = TSNE(
        n_components=2,
        perplexity=chosen.perplexity,
        max_iter=chosen.max_iter,
        n_iter_without_progress=chosen.n_iter_without_progress,
        learning_rate=chosen.learning_rate,
        metric=chosen.metric,
        init=chosen.init,
        random_state=seed,
    ).fit_transform(rows)
    before, after = points[: len(first)], points[len(first) :]
    if whole:
        before, after = before[selection.natural], after[selection.adversarial]
    return Projection(before, after, shown[0].labels, shown[1].labels, shown[1].predictions)


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


def _mean(values: Values) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else float("nan")
