"""Mining of positives and negatives. Miners return indices; the loss consumes them."""

from typing import NamedTuple

import torch
from torch import Tensor

from tla_service.triplets.distance import cosine_similarity

# Similarities of this many pairs are held at a time, so that a large pool needs no large matrix (64 MiB in float32).
PAIRS_AT_A_TIME = 2**24


class Negatives(NamedTuple):
    """Mined negatives.

    Attributes:
        indices: Row of the pool for each anchor (N,), int64; 0 where there is none.
        valid: Whether the anchor has a negative (N,), bool; without one it contributes no triplet.
    """

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
    """For each anchor, the closest embedding of another class in the pool (Mao et al. 2019, section 4).

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
    anchor_labels: Tensor,
    pool_labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    any_class: bool = False,
) -> Negatives:
    """For each anchor, a uniformly drawn pool entry of another class (TLA-RN), or of any class (the authors' code).

    Args:
        anchor_labels: True classes (N,).
        pool_labels: Classes of the pool (M,).
        generator: Source of the draw, on the labels' device.
        any_class: Draw from the whole pool; a "negative" may then be of the anchor's own class.
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
    """For each anchor, the next pool entry of its class after its own row, cyclically.

    The pool is in random order, so this is a random other image of the class, however the pool is distributed over
    workers. An anchor whose class has no other entry gets its own row.

    Args:
        anchor_labels: True classes (N,).
        pool_labels: Classes of the pool (M,), which contains the anchors' own clean images.
        own_rows: Row of each anchor's own clean image in the pool (N,).

    Returns:
        Rows of the pool (N,), int64.
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
