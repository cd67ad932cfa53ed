"""The learned metric at work: nearest neighbours, shift ratios r and r', and t-SNE pictures.

Sources: Mao et al. 2019, Table 4 and Fig. 4 (neighbours); section 5.2 and Tables 2 and 3 (ratios); Figs. 1 and 2.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.results import Share, Shift, share_of
from tla_service.inference.detector import Floats, Integers, Scores, unit_rows
from tla_service.triplets import angular_distance, cosine_similarity

Metric = Literal["angular", "cosine", "euclidean"]
# Distances held at once: 2^24 float32 are 64 MiB, however large the bank is.
_PAIRS_AT_ONCE = 1 << 24
_ROWS_AT_ONCE = 1024
# As in the authors' code. Their learning rate of 20 is 5 in scikit-learn, whose definition is larger by a factor of 4;
# whether their library honours the metric is not known.
_TSNE: dict[str, Any] = {
    "perplexity": 15.0, "max_iter": 5000, "n_iter_without_progress": 800, "learning_rate": 5.0, "metric": "cosine",
    "init": "random",
}  # fmt: skip


def distances(first: torch.Tensor, second: torch.Tensor, metric: Metric = "angular") -> torch.Tensor:
    """Distances (N, M) of all pairs of embeddings (N, D) and (M, D).

    `angular` is the learned metric D = 1 - |cos| (Mao et al. 2019, section 4), in [0, 1]; `cosine` is 1 - cos, in
    [0, 2]; `euclidean` takes the embeddings as they are. An all-zero embedding has cosine 0.
    """
    if metric == "euclidean":
        # By matrix products, a dozen times as fast; in float64, for they lose the small distances of tight clusters.
        exact = torch.cdist(first.double(), second.double(), compute_mode="use_mm_for_euclid_dist")
        return exact.to(first.dtype)
    cosines = cosine_similarity(first, second)
    return 1 - (cosines.abs() if metric == "angular" else cosines)


def nearest(queries: Floats, bank: Floats, count: int, *, metric: Metric = "angular") -> tuple[Integers, Floats]:
    """The `count` nearest rows of a bank (N, D) for queries (M, D), exactly: rows and distances, each (M, count).

    Nearest first, the lower row first among equals. `count` is in [1, N].
    """
    rows = max(1, _PAIRS_AT_ONCE // len(bank))
    held = torch.from_numpy(np.ascontiguousarray(bank))
    indices, found = np.empty((len(queries), count), np.int64), np.empty((len(queries), count), bank.dtype)
    for start in range(0, len(queries), rows):
        part = torch.from_numpy(np.ascontiguousarray(queries[start : start + rows])).to(held.dtype)
        chosen, values = _smallest(distances(part, held, metric), count)
        indices[start : start + rows], found[start : start + rows] = chosen.numpy(), values.numpy()
    return indices, found


def neighbour_votes(queries: Floats, bank: Embedded, *, k: int = 50, metric: Metric = "angular") -> Integers:
    """Classes (M,) of embeddings (M, D) by a vote of the `k` nearest training images; the nearest decides ties."""
    neighbours, _ = nearest(queries, bank.embeddings, k, metric=metric)
    classes = bank.labels[neighbours]
    votes = np.zeros((len(classes), int(bank.labels.max()) + 1), np.int64)
    np.add.at(votes, (np.arange(len(classes))[:, None], classes), 1)
    leads = np.take_along_axis(votes, classes, 1) == votes.max(1, keepdims=True)
    # Neighbours are in order, so the first one of a leading class is the nearest.
    return classes[np.arange(len(classes)), leads.argmax(1)]


def neighbour_accuracy(queries: Embedded, bank: Embedded, *, k: int = 50, metric: Metric = "angular") -> Share:
    """Accuracy of the k-NN classifier on embeddings; Mao et al. 2019, Table 4, names neither bank nor distance."""
    return share_of(neighbour_votes(queries.embeddings, bank, k=k, metric=metric) == queries.labels)


def neighbour_score(images: Embedded, bank: Embedded, *, k: int = 50, metric: Metric = "angular") -> Scores:
    """Minus the distance to the k-th nearest row of the bank (N,): a baseline to detect errors by (Sun et al. 2022)."""
    _, found = nearest(images.embeddings, bank.embeddings, k, metric=metric)
    return -found[:, -1].astype(np.float64)


def pick_queries(clean: Embedded, count: int, seed: int) -> Integers:
    """Rows of at most `count` images that are right when clean: drawn blind to the attack, classes in turn."""
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(clean.correct))
    labels = clean.labels[shuffled]
    turn = np.empty(len(shuffled), np.int64)
    for klass in np.unique(labels):
        members = np.flatnonzero(labels == klass)
        turn[members] = np.arange(len(members))
    return shuffled[np.lexsort((labels, turn))[:count]]


@dataclass(frozen=True)
class ShiftRatios:
    """Distances D = 1 - |cos| of adversarials to natural images, over those of natural images to each other (K,).

    r: mean D between adversarials misclassified as a class and its natural images, over the mean D of the unordered
    pairs of these; higher is better. r': the same with adversarials crafted from the class's own images; lower is
    better. NaN where nothing is misclassified as the class, or the denominator is undefined or zero.
    """

    r: Scores
    r_prime: Scores

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
    adversarials of a class, also those that the network gets right.
    """
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


def mean_of(ratios: Scores) -> float | None:
    """Mean over the classes that have a ratio; None without any."""
    found = ratios[~np.isnan(ratios)]
    return float(found.mean()) if len(found) else None


def select_class(natural: Embedded, adversarial: Embedded, klass: int) -> tuple[Embedded, Embedded]:
    """The images of Fig. 1: the first natural and attacked ones of a true class."""
    rows, others = (np.flatnonzero(images.labels == klass) for images in (natural, adversarial))
    return natural.subset(rows[:500]), adversarial.subset(others[:1000])


def select_pair(natural: Embedded, adversarial: Embedded, source: int, target: int) -> tuple[Embedded, Embedded]:
    """The images of Fig. 2: the first natural ones of each of two classes, attacked ones of one taken as the other."""
    # By class: in the order of a test set, all images of one may come before any of the other.
    rows = np.concatenate([np.flatnonzero(natural.labels == klass)[:100] for klass in (source, target)])
    taken = (adversarial.labels == source) & (adversarial.predictions == target)
    return natural.subset(rows), adversarial.subset(np.flatnonzero(taken))


def project(natural: Embedded, adversarial: Embedded, *, seed: int) -> Projection:
    """Project natural and attacked embeddings, 16 at least together, into the plane by t-SNE.

    The authors project all images, then select; 20,000 points take the better part of an hour.
    """
    from sklearn.manifold import TSNE

    rows = unit_rows(np.concatenate([natural.embeddings, adversarial.embeddings])).astype(np.float32)
    points = TSNE(n_components=2, random_state=seed, **_TSNE).fit_transform(rows)
    return Projection(points[: len(natural)], points[len(natural) :], natural.labels, adversarial.predictions)


def _smallest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and values (M, count) of each row's smallest, in order; the lower column first of equals."""
    last = values.kthvalue(count, dim=1, keepdim=True).values
    candidates = values <= last
    chosen = torch.empty(len(values), count, dtype=torch.int64)
    plain = candidates.sum(1) == count
    chosen[plain] = candidates[plain].nonzero()[:, 1].view(-1, count)
    # Where several are as far as the last one, only a stable sort knows which belong.
    for row in (~plain).nonzero().flatten().tolist():
        chosen[row] = values[row].sort(stable=True).indices[:count]
    found = values.gather(1, chosen)
    order = found.sort(dim=1, stable=True).indices
    ordered = torch.where(plain[:, None], chosen.gather(1, order), chosen)
    return ordered, values.gather(1, ordered)


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
