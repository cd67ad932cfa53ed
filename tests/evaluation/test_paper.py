"""The paper's figures, held against what its text says of them."""

import pytest

from tla_service.evaluation.paper import differences_from_paper, paper_row


def accuracy(data: str, method: str, attack: str) -> float:
    row = paper_row(data, method)
    assert row is not None
    return row.accuracy[attack]


@pytest.mark.parametrize(
    ("data", "attack", "baseline", "gain"),
    [
        ("mnist", "pgd100x20", "alp", 1.86),
        ("mnist", "clean", "at", 0.28),
        ("cifar10", "mim40", "alp", 4.12),
        ("cifar10", "pgd20x20", "at", 4.82),
        ("tiny_imagenet", "cw10", "at", 1.05),
        ("tiny_imagenet", "pgd20x20", "at", 1.10),
    ],
)
def test_gains_are_those_of_the_text(data: str, attack: str, baseline: str, gain: float) -> None:
    assert accuracy(data, "tla", attack) - accuracy(data, baseline, attack) == pytest.approx(gain, abs=0.005)


def test_detection_gain_of_the_poster() -> None:
    tla, at = paper_row("mnist", "tla"), paper_row("mnist", "at")
    assert tla is not None
    assert at is not None
    assert tla.detection is not None
    assert at.detection is not None
    assert tla.detection - at.detection == pytest.approx(3.69, abs=0.005)


def test_a_different_setting_is_named() -> None:
    assert differences_from_paper("mnist", "mnist_cnn", 10_000, same_attacks=True) == []
    apart = differences_from_paper("mnist", "small_cnn", 1000, same_attacks=False)
    assert len(apart) == 3
    assert differences_from_paper("digits", "digits_cnn", 450, same_attacks=True) == ["the paper has no digits"]
    assert paper_row("digits", "tla") is None
    assert paper_row("mnist", "trades") is None
