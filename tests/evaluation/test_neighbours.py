"""Neighbours: by loops over all pairs, ties, votes, and retrieval."""

import numpy as np
import pytest

from tla_service.evaluation import geometry
from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.geometry import (
    nearest,
    neighbour_accuracy,
    neighbour_score,
    neighbour_votes,
    pick_queries,
)


def distance(u: np.ndarray, v: np.ndarray, metric: str) -> float:
    if metric == "euclidean":
        return float(np.sqrt(sum((a - b) ** 2 for a, b in zip(u, v, strict=True))))
    lengths = float(np.sqrt((u**2).sum()) * np.sqrt((v**2).sum()))
    cosine = float((u * v).sum()) / lengths if lengths else 0.0
    return 1 - (abs(cosine) if metric == "angular" else cosine)


def embedded(count: int, seed: int, width: int = 4, classes: int = 3) -> Embedded:
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    rows = random.normal(size=(count, width)) + 2 * np.eye(classes, width)[labels]
    logits = np.eye(classes)[labels] + random.normal(size=(count, classes))
    return Embedded(rows.astype(np.float32), logits.astype(np.float32), labels)


def plain(rows: np.ndarray) -> Embedded:
    rows = rows.astype(np.float32)
    return Embedded(rows, np.zeros((len(rows), 3), np.float32), np.zeros(len(rows), np.int64))


@pytest.mark.parametrize("at_once", [1 << 24, 50], ids=["whole", "in parts"])
@pytest.mark.parametrize("metric", ["angular", "cosine", "euclidean"])
def test_neighbours_and_votes_by_loops(metric: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_PAIRS_AT_ONCE", at_once)
    queries, bank = embedded(17, 1), embedded(23, 2)
    queries.embeddings[3] = 0
    indices, found = nearest(queries.embeddings, bank.embeddings, 7, metric=metric)
    votes = neighbour_votes(queries.embeddings, bank, k=7, metric=metric)
    right = 0
    for place, query in enumerate(queries.embeddings.astype(np.float64)):
        away = [distance(query, row, metric) for row in bank.embeddings.astype(np.float64)]
        order = sorted(range(23), key=lambda row: (round(away[row], 6), row))[:7]
        assert indices[place].tolist() == order
        np.testing.assert_allclose(found[place], [away[row] for row in order], atol=1e-6)
        classes = [int(bank.labels[row]) for row in order]
        winner = min(classes, key=lambda klass: (-classes.count(klass), classes.index(klass)))
        assert votes[place] == winner
        right += winner == queries.labels[place]
    accuracy = neighbour_accuracy(queries, bank, k=7, metric=metric)
    assert (accuracy.estimate, accuracy.images) == (right / 17, 17)
    share, z = right / 17, 1.959964
    centre = (share + z**2 / 34) / (1 + z**2 / 17)
    half = z / (1 + z**2 / 17) * np.sqrt(share * (1 - share) / 17 + z**2 / (4 * 17**2))
    np.testing.assert_allclose((accuracy.low, accuracy.high), (centre - half, centre + half), atol=1e-6)
    score = neighbour_score(queries, bank, k=7, metric=metric)
    np.testing.assert_array_equal(score, -found[:, 6].astype(np.float64))


def test_metrics_differ_where_they_should() -> None:
    bank = np.array([[-1.0, 0.0], [0.6, 0.8], [9.0, 3.0]], np.float32)
    query = np.array([[1.0, 0.0]], np.float32)
    assert nearest(query, bank, 3, metric="angular")[0].tolist() == [[0, 2, 1]], "the opposite direction is near"
    assert nearest(query, bank, 3, metric="cosine")[0].tolist() == [[2, 1, 0]]
    assert nearest(query, bank, 3, metric="euclidean")[0].tolist() == [[1, 0, 2]]


def test_tight_clusters_far_from_zero_keep_their_distances() -> None:
    bank = (1000 + np.array([[0.0, 0.0], [0.25, 0.0], [0.5, 0.0]])).astype(np.float32)
    indices, found = nearest(bank[2:], bank, 3, metric="euclidean")
    assert indices.tolist() == [[2, 1, 0]]
    np.testing.assert_allclose(found, [[0, 0.25, 0.5]], atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_the_lower_row_comes_first_of_equals(count: int) -> None:
    bank = np.array([[1, 1], [0, 1], [1, 0], [0, 2], [1, 0], [0, 4]], np.float32)
    indices, _ = nearest(np.array([[0, 1], [1, 0]], np.float32), bank, count)
    assert indices.tolist() == [[1, 3, 5, 0, 2, 4][:count], [2, 4, 0, 1, 3, 5][:count]]


def test_equal_votes_go_to_the_nearest_class() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0], [0.1, 1.0]], np.float32)
    bank = Embedded(rows, np.zeros((4, 3), np.float32), np.array([2, 0, 0, 2]))
    assert neighbour_votes(np.array([[1.0, 0.0], [1.0, 0.6]], np.float32), bank, k=2).tolist() == [2, 0]


def test_queries_are_right_when_clean_and_take_classes_in_turn() -> None:
    clean = embedded(60, 3)
    chosen = pick_queries(clean, 6, seed=0)
    assert clean.correct[chosen].all()
    assert clean.labels[chosen].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(set(chosen.tolist())) == 6
    assert pick_queries(clean, 6, seed=0).tolist() == chosen.tolist()
    assert pick_queries(clean, 6, seed=1).tolist() != chosen.tolist()
    assert sorted(pick_queries(clean, 99, seed=0)) == np.flatnonzero(clean.correct).tolist()
