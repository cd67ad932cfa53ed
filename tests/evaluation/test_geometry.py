"""Geometry: r and r' by loops over pairs, classes without a ratio, choices of pictures, and projections."""

import math

import numpy as np
import pytest

from tla_service.evaluation import geometry
from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.geometry import (
    project,
    select_class,
    select_pair,
    shift_ratios,
)
from tla_service.evaluation.results import Shift


def made(labels: list[int], predictions: list[int], seed: int, width: int = 5, classes: int = 4) -> Embedded:
    rows = np.random.default_rng(seed).normal(size=(len(labels), width)).astype(np.float32)
    return Embedded(rows, np.eye(classes, dtype=np.float32)[predictions], np.array(labels, np.int64))


def distance(u: np.ndarray, v: np.ndarray) -> float:
    u, v = u.astype(np.float64), v.astype(np.float64)
    return 1 - abs(float(u @ v)) / math.sqrt(float(u @ u) * float(v @ v))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@pytest.mark.parametrize("at_once", [1024, 2], ids=["whole", "in parts"])
def test_ratios_by_loops(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_ROWS_AT_ONCE", at_once)
    labels = [0, 1, 0, 1, 2, 2, 0, 1, 2, 0]
    natural = made(labels, labels, 1, classes=3)
    attacked = made(labels, [1, 1, 2, 0, 2, 0, 0, 2, 1, 1], 2, classes=3)
    found = shift_ratios(natural, attacked)
    ratios, primes = [], []
    for klass in range(3):
        members = [row for row in range(10) if labels[row] == klass]
        spread = mean(
            [distance(natural.embeddings[i], natural.embeddings[j]) for i in members for j in members if i < j]
        )
        taken = [row for row in range(10) if attacked.predictions[row] == klass and labels[row] != klass]
        away = mean([distance(attacked.embeddings[i], natural.embeddings[j]) for i in taken for j in members])
        crafted = mean([distance(attacked.embeddings[i], natural.embeddings[j]) for i in members for j in members])
        ratios.append(away / spread)
        primes.append(crafted / spread)
    np.testing.assert_allclose(found.r, ratios)
    np.testing.assert_allclose(found.r_prime, primes)
    assert found.at(0.1) == Shift(0.1, pytest.approx(mean(ratios)), pytest.approx(mean(primes)), 0, 0)


def test_classes_without_a_ratio_are_left_out_and_counted() -> None:
    labels = [0, 0, 0, 1, 1, 2]  # one image in class 2, none in class 3
    natural = made(labels, labels, 1)
    attacked = made(labels, [1, 1, 0, 1, 2, 1], 2)  # nothing is mistaken for 0 or 3
    found = shift_ratios(natural, attacked)
    assert np.isnan(found.r).tolist() == [True, False, True, True]
    assert np.isnan(found.r_prime).tolist() == [False, False, True, True]
    assert found.at(0.1) == Shift(0.1, found.r[1], pytest.approx(found.r_prime[:2].mean()), 3, 2)


def test_identical_images_and_harmless_attacks_leave_nothing_to_average() -> None:
    natural = made([0, 0, 1, 1], [0, 0, 1, 1], 1, classes=2)
    harmless = shift_ratios(natural, natural).at(0.1)
    # Half of the pairs are of an image with itself.
    assert harmless == Shift(0.1, None, pytest.approx(0.5), 2, 0)
    natural.embeddings[:2] = natural.embeddings[0]
    assert np.isnan(shift_ratios(natural, natural).r_prime).tolist() == [True, False]


def test_pictures_choose_their_images() -> None:
    natural = made([0, 1, 2, 1, 0, 1, 2], [0] * 7, 1)
    attacked = made([0, 1, 2, 1, 0, 1, 2], [1, 2, 0, 2, 1, 0, 2], 2)

    def rows(chosen: tuple[Embedded, Embedded]) -> list[list[int]]:
        """Which rows of the natural and of the attacked images they are."""
        pairs = zip(chosen, (natural, attacked), strict=True)
        return [[part.embeddings.tolist().index(row) for row in one.embeddings.tolist()] for one, part in pairs]

    assert rows(select_class(natural, attacked, 1)) == [[1, 3, 5], [1, 3, 5]]
    assert rows(select_pair(natural, attacked, 1, 2)) == [[1, 3, 5, 2, 6], [1, 3]]
    assert rows(select_pair(natural, attacked, 2, 1)) == [[2, 6, 1, 3, 5], []]
    assert rows(select_pair(natural, attacked, 1, 3)) == [[1, 3, 5], []]  # there is none of class 3
    assert rows(select_class(natural, attacked, 3)) == [[], []]


def test_pictures_take_as_many_images_of_both_classes_of_a_pair() -> None:
    in_a_row = np.repeat(np.arange(3), 600).tolist()  # as the folders of a test set are read
    natural, attacked = made(in_a_row, [0] * 1800, 1), made(in_a_row, [1] * 1800, 2)
    chosen, crossed = select_pair(natural, attacked, 0, 1)
    assert np.bincount(chosen.labels).tolist() == [100, 100]
    assert len(crossed) == 600
    assert [len(part) for part in select_class(natural, attacked, 1)] == [500, 600]


def test_projection_is_joint_and_fixed_by_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"perplexity": 4, "max_iter": 250, "learning_rate": "auto"}
    monkeypatch.setattr(geometry, "_TSNE", geometry._TSNE | quick)
    natural, attacked = made([0, 1] * 8, [0, 1] * 8, 1), made([0, 1] * 8, [1, 0] * 8, 2)
    for images in (natural, attacked):  # two directions: half of the images of each kind in either
        images.embeddings[:8, 0] += 20
        images.embeddings[8:, 1] += 20
    natural, attacked = natural.subset(np.arange(2, 14)), attacked.subset(np.arange(3, 13))
    found = project(natural, attacked, seed=0)
    assert found.natural.shape == (12, 2)
    assert found.adversarial.shape == (10, 2)
    assert found.labels.tolist() == natural.labels.tolist()
    assert found.predictions.tolist() == attacked.predictions.tolist()
    gaps = np.linalg.norm(found.natural[:6, None] - found.adversarial[None], axis=2).mean(0)
    assert gaps[:5].max() < gaps[5:].min(), "attacked images lie beside natural ones of their direction"
    again, other = (project(natural, attacked, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(found.natural, again.natural)
    assert not np.array_equal(found.natural, other.natural)
