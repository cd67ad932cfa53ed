"""The triplet objective (Mao et al. 2019, section 4): distance, mining, and the terms, one value per example."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tla_service.runtime import wide

# Under square roots: an all-zero embedding then has a defined direction (zero), and gradients of zero instead of NaN.
SMALLEST_SQUARE = 1e-20
# Similarities of this many pairs are held at a time, so that a large pool needs no large matrix (64 MiB in float32).
PAIRS_AT_A_TIME = 2**24


def unit_length(embeddings: Tensor) -> Tensor:
    """Scale each embedding (N, D) to length one; in float32 or wider."""
    embeddings = wide(embeddings)
    return embeddings * (embeddings.square().sum(1, keepdim=True) + SMALLEST_SQUARE).rsqrt()


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of all pairs: (N, D) and (M, D) to (N, M), in [-1, 1] up to rounding."""
    return unit_length(first) @ unit_length(second).T


def angular_distance(first: Tensor, second: Tensor) -> Tensor:
    """D(u, v) = 1 - |cos(u, v)| (no arccos), row by row: (N, D) twice to (N,), in [0, 1] up to rounding."""
    return 1 - (unit_length(first) * unit_length(second)).sum(1).abs()


def triplet_hinge(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """[D(a, p) - D(a, n) + margin]+ (equation 1), row by row: (N, D) three times to (N,), in [0, 1 + margin]."""
    return F.relu(angular_distance(anchors, positives) - angular_distance(anchors, negatives) + margin)


def norm_penalty(embeddings: tuple[Tensor, ...], form: str) -> Tensor:
    """Penalty on the length of anchors, positives and negatives, (N, D) each, to (N,), at least 0 (equation 1).

    Form `l2_norms` is the sum of their L2 norms (the paper); `mean_squares` the sum of squared entries, averaged over
    the D dimensions (the authors' code).
    """
    if form == "mean_squares":
        return torch.stack([wide(e).square().mean(1) for e in embeddings]).sum(0)
    return torch.stack([(wide(e).square().sum(1) + SMALLEST_SQUARE).sqrt() for e in embeddings]).sum(0)


class Negatives(NamedTuple):
    """The pool's row (N,), int64, of each anchor's negative, and whether it has one (N,), bool; without, row 0."""

    indices: Tensor
    valid: Tensor


@torch.no_grad()
def mine_hardest(
    anchors: Tensor,
    anchor_labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    *,
    absolute: bool = True,
    keep: Tensor | None = None,
) -> Negatives:
    """For each anchor, the closest embedding of another class in the pool.

    Same-class entries are excluded, not set to zero: a zero would beat a negative cosine. Ties go to the lowest index.

    Args:
        anchors: Adversarial embeddings (N, D).
        anchor_labels: Their true classes (N,).
        pool: Clean embeddings (M, D).
        pool_labels: Their classes (M,).
        absolute: Closest by |cos|, the loss's own distance; else by the signed cosine (the authors' code).
        keep: Pool entries each anchor may use (N, M), bool; None means all.
    """
    indices = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    valid = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    rows = max(1, PAIRS_AT_A_TIME // max(1, len(pool)))
    for start in range(0, len(anchors), rows):
        chunk = slice(start, start + rows)
        similarity = cosine_similarity(anchors[chunk], pool)
        similarity = similarity.abs() if absolute else similarity
        allowed = anchor_labels[chunk, None] != pool_labels[None, :]
        if keep is not None:
            allowed &= keep[chunk]
        # argmax alone does not guarantee the first of equal values on every device.
        similarity = similarity.masked_fill(~allowed, -torch.inf)
        is_closest = similarity == similarity.amax(1, keepdim=True)
        indices[chunk] = first_true(is_closest & allowed)
        valid[chunk] = allowed.any(1)
    return Negatives(indices, valid)


@torch.no_grad()
def mine_random(
    anchor_labels: Tensor, pool_labels: Tensor, generator: torch.Generator | None = None, *, any_class: bool = False
) -> Negatives:
    """For each anchor, a uniformly drawn pool entry of another class (TLA-RN), or of any class (the authors' code).

    Classes are those of `mine_hardest`; the generator is on their device. With `any_class`, a "negative" may be of the
    anchor's own class.
    """
    allowed = anchor_labels[:, None] != pool_labels[None, :]
    if any_class:
        allowed = torch.ones_like(allowed)
    count = allowed.sum(1)
    draw = torch.rand(len(anchor_labels), generator=generator, device=anchor_labels.device, dtype=torch.float64)
    nth = (draw * count).long().clamp_max((count - 1).clamp_min(0))
    return Negatives(first_true(allowed & (allowed.cumsum(1) == nth[:, None] + 1)), count > 0)


@torch.no_grad()
def pick_positives(anchor_labels: Tensor, pool_labels: Tensor, own_rows: Tensor) -> Tensor:
    """For each anchor, the pool's row (N,), int64, of the next entry of its class after its own, cyclically.

    The pool is in random order, so this is a random other image of the class, however the pool is distributed over
    workers. An anchor whose class has no other entry gets its own row: `own_rows` (N,), of its clean image.
    """
    size = len(pool_labels)
    steps = torch.arange(size, device=pool_labels.device)[None, :] - own_rows[:, None] - 1
    distance = torch.where(anchor_labels[:, None] == pool_labels[None, :], steps % size, size)
    return first_true(distance == distance.amin(1, keepdim=True))


def first_true(mask: Tensor) -> Tensor:
    """Column of the first True of each row (N, M) to (N,); 0 where there is none."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, columns, mask.shape[1]).amin(1)
    return torch.where(first == mask.shape[1], 0, first)
