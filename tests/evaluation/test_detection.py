"""Detection: Gaussians by the textbook, AUC by counting pairs, intervals, thresholds, and what cannot be measured."""

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import multivariate_normal

from tla_service.errors import ConfigError
from tla_service.evaluation import detection
from tla_service.evaluation.detection import (
    detect_misclassified,
    fit_detector,
    measure_detection,
    threshold_for,
)
from tla_service.evaluation.embedding import Embedded
from tla_service.inference.detector import Detector


def embedded(labels: list[int], width: int = 3, seed: int = 0, classes: int = 3, spread: float = 0.5) -> Embedded:
    """Clusters around one direction a class; the logits are at random, so that some are wrong."""
    random = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(99).normal(size=(classes, width))
    rows = centres[labels] + spread * random.normal(size=(len(labels), width)) * np.linspace(0.5, 1.5, width)
    logits = np.eye(classes)[labels] * 2 + random.normal(size=(len(labels), classes))
    return Embedded(rows.astype(np.float32), logits.astype(np.float32), np.array(labels, np.int64))


def pair_auc(scores: np.ndarray, correct: np.ndarray) -> float:
    """The share of (right, wrong) pairs in which the right one scores higher; equals count half."""
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[correct] for n in scores[~correct]]
    return sum(wins) / len(wins)


def hand_density(row: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    away = row - mean
    quadratic = float(away @ np.linalg.inv(covariance) @ away)
    return -0.5 * (quadratic + math.log(np.linalg.det(covariance)) + len(row) * math.log(2 * math.pi))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal"])
def test_densities_are_the_textbooks(covariance: str, normalize: bool) -> None:
    training, test = embedded([0] * 9 + [1] * 8 + [2] * 12), embedded([0, 1, 2, 1], seed=5)
    detector = fit_detector(training, covariance=covariance, shrinkage="none", normalize=normalize, variance_floor=1e-9)

    def prepared(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows

    rows, queries = prepared(training.embeddings), prepared(test.embeddings)
    found = detector.log_densities(test.embeddings)
    means = [rows[training.labels == klass].mean(0) for klass in range(3)]
    residuals = [rows[training.labels == klass] - means[klass] for klass in range(3)]
    for klass in range(3):
        part = np.concatenate(residuals) if covariance == "tied" else residuals[klass]
        matrix = part.T @ part / len(part)
        matrix = np.diag(np.diag(matrix)) if covariance == "diagonal" else matrix
        for place, query in enumerate(queries):
            assert found[place, klass] == pytest.approx(hand_density(query, means[klass], matrix), rel=1e-4, abs=1e-4)
            library = multivariate_normal(means[klass], matrix).logpdf(query)
            assert found[place, klass] == pytest.approx(library, rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(detector.score(test.embeddings, test.predictions), found.max(1))


def test_the_predicted_class_may_be_asked_instead() -> None:
    training, test = embedded([0] * 9 + [1] * 8 + [2] * 12), embedded([0, 1, 2, 1] * 5, seed=5)
    detector = fit_detector(training, rule="predicted")
    densities = detector.log_densities(test.embeddings)
    expected = [densities[row, klass] for row, klass in enumerate(test.predictions)]
    np.testing.assert_array_equal(detector.score(test.embeddings, test.predictions), expected)
    assert (detector.score(test.embeddings, test.predictions) < densities.max(1)).any()


def test_a_class_without_training_images_is_never_likely() -> None:
    training, test = embedded([0] * 9 + [2] * 9), embedded([0, 1, 2] * 6, seed=5)
    detector = fit_detector(training, rule="predicted")
    assert detector.classes.tolist() == [0, 2]
    densities, scores = detector.log_densities(test.embeddings), detector.score(test.embeddings, test.predictions)
    assert np.isfinite(scores).all()
    assert {0, 1, 2} == set(test.predictions.tolist())
    for row, klass in enumerate(test.predictions):
        if klass == 1:
            assert scores[row] < densities.min()
        else:
            assert scores[row] == densities[row, 0 if klass == 0 else 1]


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal"])
@pytest.mark.parametrize("shrinkage", ["ledoit_wolf", "none"])
def test_few_images_in_many_dimensions(covariance: str, shrinkage: str) -> None:
    training = embedded([0] * 4 + [1] * 5 + [2], width=40)
    training.embeddings[:, 7] = 0  # a dead unit
    detector = fit_detector(training, covariance=covariance, shrinkage=shrinkage)
    near, far = embedded([0, 1, 2], width=40, seed=3), embedded([0, 1, 2], width=40, seed=4, spread=8)
    near.embeddings[:, 7] = far.embeddings[:, 7] = 0
    assert np.isfinite(detector.log_densities(far.embeddings)).all()
    assert (detector.score(near.embeddings, near.predictions) > detector.score(far.embeddings, far.predictions)).all()


def test_a_single_image_takes_the_shared_covariance() -> None:
    training = embedded([0] * 9 + [1] * 8 + [2])
    alone, tied = (fit_detector(training, covariance=name) for name in ("full", "tied"))
    np.testing.assert_allclose(alone.whitening[2], tied.whitening[0])
    assert not np.allclose(alone.whitening[0], tied.whitening[0])


def test_nothing_to_fit_and_nothing_to_score_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not vary within any class"):
        fit_detector(embedded([0, 1, 2]))
    detector = fit_detector(embedded([0, 1, 2] * 4))
    with pytest.raises(ValueError, match=r"want finite ones, \(N, 3\)"):
        detector.log_densities(np.full((1, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"want finite ones, \(N, 3\)"):
        detector.log_densities(np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal"])
def test_a_detector_survives_a_file(covariance: str, tmp_path: Path) -> None:
    detector = fit_detector(embedded([0, 1, 2] * 6), covariance=covariance, normalize=False, rule="predicted")
    save_file(detector.to_arrays(), tmp_path / "detector.safetensors")
    again = Detector.from_arrays(load_file(tmp_path / "detector.safetensors"))
    test = embedded([0, 1, 2] * 3, seed=4)
    np.testing.assert_array_equal(
        again.score(test.embeddings, test.predictions), detector.score(test.embeddings, test.predictions)
    )
    assert (again.normalize, again.rule) == (False, "predicted")


@pytest.mark.parametrize("decimals", [0, 1, 6], ids=["many ties", "some ties", "none"])
def test_auc_counts_pairs(decimals: int) -> None:
    random = np.random.default_rng(2)
    correct = random.random(70) < 0.7
    scores = np.round(random.normal(size=70) + correct, decimals)
    result = measure_detection(scores, correct, np.arange(70), seed=0)
    assert result.score.auc == pytest.approx(pair_auc(scores, correct), abs=1e-12)
    assert (result.num_correct, result.num_wrong) == (correct.sum(), (~correct).sum())
    points = set(zip(result.false_accepts.round(9).tolist(), result.true_accepts.round(9).tolist(), strict=True))
    every = {
        tuple(round(float((scores[side] >= threshold).mean()), 9) for side in (~correct, correct))
        for threshold in (np.inf, *scores)
    }
    assert {(0.0, 0.0), (1.0, 1.0)} <= points <= every


def test_the_interval_resamples_images_with_all_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "_RESAMPLES", 50)
    random = np.random.default_rng(3)
    images = np.tile(np.arange(30), 2)
    correct = random.random(60) < 0.6
    scores = np.round(random.normal(size=60) + correct, 1)
    result = measure_detection(scores, correct, images, seed=5).score
    draws, expected = np.random.default_rng(5), []
    for _ in range(50):
        rows = [row for image in draws.integers(30, size=30) for row in np.flatnonzero(images == image)]
        expected.append(pair_auc(scores[rows], correct[rows]))
    np.testing.assert_allclose((result.low, result.high), np.quantile(expected, [0.025, 0.975]), atol=1e-12)
    assert result.low < result.auc < result.high
    again, other = (measure_detection(scores, correct, images, seed=s).score for s in (5, 6))
    assert again.low == result.low != other.low


@pytest.mark.parametrize("right", [True, False])
def test_no_auc_without_both_outcomes(right: bool) -> None:
    result = measure_detection(np.arange(4.0), np.full(4, right), np.arange(4), seed=0)
    assert (result.score.auc, result.score.low) == (None, None)
    assert result.score.reason.startswith("every image is" if right else "none of the images is")
    assert len(result.false_accepts) == 0


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.29, 0.5, 0.999])
def test_the_threshold_is_the_highest_that_keeps_the_rate(rate: float) -> None:
    random = np.random.default_rng(4)
    for scores in (random.normal(size=130), np.round(random.normal(size=130), 0)):
        correct = np.arange(130) < 100
        threshold = threshold_for(scores, correct, rate)
        right = scores[correct]
        assert (right < threshold).sum() <= round(rate * 100, 6)
        higher = [value for value in right if value > threshold]
        assert all((right < value).sum() > round(rate * 100, 6) for value in higher)
    with pytest.raises(ConfigError, match="outside"):
        threshold_for(scores, correct, 1.0)
    with pytest.raises(ConfigError, match="none of the 130"):
        threshold_for(scores, np.zeros(130, bool), 0.1)


def test_all_scores_on_natural_and_attacked_images_together() -> None:
    training = embedded([0, 1, 2] * 10)
    natural, attacked = embedded([0, 1, 2] * 8, seed=1), embedded([0, 1, 2] * 8, seed=2, spread=3)
    detector = fit_detector(training)
    results = detect_misclassified(detector, training, natural, attacked, seed=0, k=5)
    both = Embedded.joined(natural, attacked)
    softmax = np.exp(both.logits) / np.exp(both.logits).sum(1, keepdims=True)
    units, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (both.embeddings, training.embeddings))
    fifth = np.sort(1 - np.abs(units @ bank.T), axis=1)[:, 4]
    expected = {
        "gaussian": detector.score(both.embeddings, both.predictions),
        "max_softmax": softmax.max(1),
        "neighbours": -fifth,
    }
    assert list(results) == list(expected)
    for name, scores in expected.items():
        assert results[name].score.auc == pytest.approx(pair_auc(scores, both.correct), abs=2e-3), name
        assert results[name].num_correct == both.correct.sum()
    paired = measure_detection(both.max_softmax, both.correct, np.array([*range(24), *range(24)]), seed=0)
    assert results["max_softmax"].score == paired.score
