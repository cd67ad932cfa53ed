"""The same mathematics in plain Python loops, one number at a time."""

import math
from collections.abc import Sequence

Vector = Sequence[float]


def length(vector: Vector) -> float:
    return math.sqrt(math.fsum(x * x for x in vector))


def cosine(first: Vector, second: Vector) -> float:
    """Zero when either vector is."""
    lengths = length(first) * length(second)
    if lengths == 0:
        return 0.0
    return math.fsum(x * y for x, y in zip(first, second, strict=True)) / lengths


def distance(first: Vector, second: Vector) -> float:
    return 1 - abs(cosine(first, second))


def hinge(anchor: Vector, positive: Vector, negative: Vector, margin: float) -> float:
    return max(distance(anchor, positive) - distance(anchor, negative) + margin, 0.0)


def candidates(label: int, pool_labels: Sequence[int], keep: Sequence[bool] | None) -> list[int]:
    """Rows of the pool that may be the negative of an anchor of this label."""
    return [row for row, other in enumerate(pool_labels) if other != label and (keep is None or keep[row])]


def hardest(anchor: Vector, pool: Sequence[Vector], rows: Sequence[int], *, absolute: bool) -> tuple[int, float]:
    """The first of `rows` with the greatest similarity, and that similarity; (0, -inf) where there is no row."""
    best, best_similarity = 0, -math.inf
    for row in rows:
        similarity = cosine(anchor, pool[row])
        similarity = abs(similarity) if absolute else similarity
        if similarity > best_similarity:
            best, best_similarity = row, similarity
    return best, best_similarity


def next_of_class(label: int, pool_labels: Sequence[int], own_row: int) -> int:
    """Walk round the pool from the row after `own_row` until the class comes up."""
    size = len(pool_labels)
    row = (own_row + 1) % size
    while row != own_row and pool_labels[row] != label:
        row = (row + 1) % size
    return row
