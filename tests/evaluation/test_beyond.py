"""Corruption accuracies and calibration against plain loops and scikit-learn."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from torch import Tensor, nn

from tests.evaluation.test_suite import Wavy, pictures
from tla_service.evaluation.beyond import (
    BINS,
    CorruptionMeasurement,
    calibrate,
    summarise_corruptions,
)
from tla_service.evaluation.beyond_figures import corruption_lines, reliability_diagram
from tla_service.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.results import BoolArray, wilson_interval
from tla_service.evaluation.shards import Shard

CPU = torch.device("cpu")


def shard(network: nn.Module, images: Tensor, labels: Tensor, rows: list[int]) -> Shard:
    return Shard(network, None, images[rows], labels[rows], np.array(rows), CPU)


def measured(network: nn.Module, *parts: Shard, size: int = 7) -> BoolArray:
    measurement = CorruptionMeasurement(0, size)
    return measurement.merge([measurement.run(part) for part in parts])


def test_accuracy_is_that_of_each_corrupted_image_whatever_the_shards() -> None:
    network = Wavy()
    images, labels = pictures(network, 12)
    whole = measured(network, shard(network, images, labels, list(range(12))))
    parts = [shard(network, images, labels, list(range(start, start + 4))) for start in (0, 4, 8)]
    assert np.array_equal(whole, measured(network, *parts, size=3))
    assert np.array_equal(whole[:, 0], (network(images / 255).logits.argmax(1) == labels).numpy())
    place = {version: 1 + at for at, version in enumerate((n, s) for n in CORRUPTIONS for s in SEVERITIES)}
    for name, severity in (("gaussian_noise", 1), ("snow", 3), ("jpeg_compression", 5)):
        corrupted = torch.from_numpy(corrupt(images.numpy(), name, severity, np.arange(12), 0))
        right = network(corrupted / 255).logits.argmax(1) == labels
        assert np.array_equal(whole[:, place[name, severity]], right.numpy())


def test_mean_corruption_error_is_the_mean_over_corruptions_and_severities() -> None:
    draws = np.random.default_rng(0)
    correct = draws.random((40, 76)) < draws.random(76)
    found = summarise_corruptions(correct)
    assert found.images == 40
    assert found.clean == wilson_interval(int(correct[:, 0].sum()), 40)
    errors = []
    for number, name in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            right = int(correct[:, 5 * number + severity].sum())
            assert found.accuracy[name][severity - 1] == wilson_interval(right, 40)
            errors.append(1 - right / 40)
    assert found.mean_error == pytest.approx(sum(errors) / 75)
    per_image = [1 - sum(row[1:]) / 75 for row in correct.tolist()]
    spread = math.sqrt(sum((each - found.mean_error) ** 2 for each in per_image) / 39 / 40)
    assert (found.low, found.high) == pytest.approx(
        (found.mean_error - 1.96 * spread, found.mean_error + 1.96 * spread)
    )
    assert list(found.by_name.values()) == sorted(found.by_name.values())
    assert found.by_name["fog"] == pytest.approx(np.mean([share.estimate for share in found.accuracy["fog"]]))


def test_without_images_nothing_is_claimed() -> None:
    found = summarise_corruptions(np.zeros((0, 76), dtype=bool))
    assert (found.mean_error, found.low, found.high, found.images) == (None, 0.0, 1.0, 0)


def logits(count: int = 300, classes: int = 4) -> Embedded:
    draws = np.random.default_rng(1)
    values = draws.normal(0, 2, (count, classes)).astype(np.float32)
    return Embedded(np.zeros((count, 2), np.float32), values, draws.integers(0, classes, count))


def test_calibration_error_is_that_of_a_plain_loop_and_of_scikit_learn() -> None:
    embedded = logits()
    found = calibrate(embedded)
    nll = brier = 0.0
    inside: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row, label in zip(embedded.logits.astype(float).tolist(), embedded.labels.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        chances = [math.exp(value) / total for value in row]
        nll -= math.log(chances[label])
        brier += sum((chance - (k == label)) ** 2 for k, chance in enumerate(chances))
        best = max(chances)
        inside[math.ceil(best * BINS) - 1].append((best, chances.index(best) == label))
    assert found.nll == pytest.approx(nll / 300)
    assert found.brier == pytest.approx(brier / 300)
    error = 0.0
    for each, images in zip(found.bins, inside, strict=True):
        assert each.accuracy.images == len(images)
        if images:
            confidence, right = (sum(column) / len(images) for column in zip(*images, strict=True))
            assert (each.confidence, each.accuracy.estimate) == pytest.approx((confidence, right))
            error += len(images) / 300 * abs(confidence - right)
    assert found.ece == pytest.approx(error)
    shares, confidences = calibration_curve(embedded.correct, embedded.max_softmax, n_bins=BINS)
    full = [each for each in found.bins if each.confidence is not None]
    assert [each.confidence for each in full] == pytest.approx(confidences.tolist())
    assert [each.accuracy.estimate for each in full] == pytest.approx(shares.tolist())


def test_an_overconfident_network_has_the_error_of_its_excess() -> None:
    values = np.log(np.tile([[0.9, 0.1]], (10, 1))).astype(np.float32)
    found = calibrate(Embedded(np.zeros((10, 1), np.float32), values, np.array([0] * 5 + [1] * 5)))
    assert (found.ece, found.confidence) == pytest.approx((0.4, 0.9))
    assert found.accuracy == wilson_interval(5, 10)


def test_likelihoods_below_the_smallest_number_count() -> None:
    sure = np.array([[1000, 0, 0], [1000, 0, 0]], np.float32)
    assert calibrate(Embedded(sure, sure, np.array([0, 1]))).nll == pytest.approx(500)


def test_pictures_are_drawn_even_if_bins_are_empty(tmp_path: Path) -> None:
    reliability_diagram({"clean": calibrate(logits()), "attacked": calibrate(logits(3))}, tmp_path / "a.png")
    corruption_lines(summarise_corruptions(np.ones((3, 76), dtype=bool)), tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000
