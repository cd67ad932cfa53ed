"""The learned metric at work: k-NN accuracy and nearest-neighbour retrieval (Mao et al. 2019, Table 4 and Fig. 4)."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tla_service.errors import ConfigError
from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.results import Share, share_of
from tla_service.inference.detector import Floats, Integers
from tla_service.triplets import cosine_similarity

Metric = Literal["angular", "cosine", "euclidean"]

# Distances held at once: 2^24 float32 are 64 MiB, however large the bank is.
_PAIRS_AT_ONCE = 1 << 24


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

    Nearest first, the lower row first among equals. ValueError if widths differ or embeddings are not finite,
    ConfigError if `count` is outside [1, N].
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries {queries.shape} and bank {bank.shape}: want (M, D) and (N, D)")
    if not 1 <= count <= len(bank):
        raise ConfigError("neighbours", count, f"outside [1, {len(bank)}], the images of the bank", "ask for fewer")
    if not (np.isfinite(queries).all() and np.isfinite(bank).all()):
        raise ValueError("queries or bank have embeddings that are not finite")
    rows = max(1, _PAIRS_AT_ONCE // len(bank))
    held = torch.from_numpy(np.ascontiguousarray(bank))
    indices, found = np.empty((len(queries), count), np.int64), np.empty((len(queries), count), bank.dtype)
    for start in range(0, len(queries), rows):
        part = torch.from_numpy(np.ascontiguousarray(queries[start : start + rows])).to(held.dtype)
        chosen, values = _smallest(distances(part, held, metric), count)
        indices[start : start + rows], found[start : start + rows] = chosen.numpy(), values.numpy()
    return indices, found


def neighbour_votes(queries: Floats, bank: Embedded, *, k: int = 50, metric: Metric = "angular") -> Integers:
    """Classes (M,) of embeddings (M, D) by a vote of the `k` nearest training images (the paper's k is 50).

    Among classes with equal votes, the one with the nearest neighbour.
    """
    neighbours, _ = nearest(queries, bank.embeddings, k, metric=metric)
    classes = bank.labels[neighbours]
    votes = np.zeros((len(classes), int(bank.labels.max()) + 1), np.int64)
    np.add.at(votes, (np.arange(len(classes))[:, None], classes), 1)
    leads = np.take_along_axis(votes, classes, 1) == votes.max(1, keepdims=True)
    # Neighbours are in order, so the first one of a leading class is the nearest.
    return classes[np.arange(len(classes)), leads.argmax(1)]


def neighbour_accuracy(queries: Embedded, bank: Embedded, *, k: int = 50, metric: Metric = "angular") -> Share:
    """Accuracy of the k-NN classifier on embeddings (Mao et al. 2019, Table 4); ValueError without queries.

    The paper names neither bank nor distance: here, the clean training images and the learned metric.
    """
    if len(queries) == 0:
        raise ValueError("there are no queries; give at least one")
    return share_of(neighbour_votes(queries.embeddings, bank, k=k, metric=metric) == queries.labels)


def neighbour_score(
    images: Embedded, bank: Embedded, *, k: int = 50, metric: Metric = "angular"
) -> npt.NDArray[np.float64]:
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
