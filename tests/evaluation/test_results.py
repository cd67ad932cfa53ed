"""Intervals against closed forms, published figures and plain enumeration."""

import itertools
import math

import numpy as np
import pytest

from tla_service.evaluation.results import class_accuracy, paired_difference, wilson_interval

Z = 1.959963984540054


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (1, 10), (5, 10), (10, 10), (81, 263), (9990, 10000)])
def test_wilson_solves_its_equation(successes: int, count: int) -> None:
    """Its ends are the shares p whose own standard error is z times away from the estimate."""
    interval = wilson_interval(successes, count)
    assert interval.estimate == successes / count
    assert interval.images == count
    for end in (interval.low, interval.high):
        spread = Z * math.sqrt(end * (1 - end) / count)
        assert abs(interval.estimate - end) == pytest.approx(spread, abs=1e-9)
    assert interval.low < interval.high
    assert interval.low == 0 or interval.low < interval.estimate
    assert interval.high == pytest.approx(1) or interval.high > interval.estimate


def test_wilson_published_example() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I: 81 of 263."""
    interval = wilson_interval(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_no_images_tell_nothing() -> None:
    interval = wilson_interval(0, 0)
    assert interval.estimate is None
    assert (interval.low, interval.high) == (0, 1)


@pytest.mark.parametrize(("successes", "count"), [(-1, 5), (6, 5)])
def test_not_a_share(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="not a share"):
        wilson_interval(successes, count)


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    one = [True] * (both + first) + [False] * (second + neither)
    two = [True] * both + [False] * first + [True] * second + [False] * neither
    order = np.random.default_rng(0).permutation(len(one))
    return np.array(one)[order], np.array(two)[order]


@pytest.mark.parametrize("counts", [(5, 3, 9, 2), (50, 1, 0, 3), (0, 7, 7, 0), (3, 12, 2, 1)])
def test_mcnemar_is_the_binomial_tail(counts: tuple[int, int, int, int]) -> None:
    _, b, c, _ = counts
    # Each discordant image is a coin: the two-sided p-value adds what is no more likely than the count seen.
    chances = [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    expected = math.fsum(p for p in chances if p <= chances[b] * (1 + 1e-9))
    result = paired_difference(*outcomes(*counts))
    assert result.p_value == pytest.approx(expected)
    assert result.images == sum(counts)
    assert result.difference == pytest.approx((b - c) / sum(counts))
    assert result.low <= result.difference <= result.high


def test_equal_models_do_not_differ() -> None:
    result = paired_difference(*outcomes(7, 0, 0, 3))
    assert (result.difference, result.p_value) == (0, 1)
    assert result.low <= 0 <= result.high


def test_swapping_the_models_turns_the_sign() -> None:
    one, two = outcomes(20, 7, 3, 5)
    there, back = paired_difference(one, two), paired_difference(two, one)
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))


@pytest.mark.parametrize("chances", [(0.5, 0.2, 0.1, 0.2), (0.75, 0.1, 0.05, 0.1), (0.3, 0.05, 0.3, 0.35)])
def test_interval_covers_the_true_difference(chances: tuple[float, float, float, float]) -> None:
    """Over every possible table of 14 images, weighted by how likely it is."""
    count, covered, total = 14, 0.0, 0.0
    truth = chances[1] - chances[2]
    for both, first, second in itertools.product(range(count + 1), repeat=3):
        neither = count - both - first - second
        if neither < 0:
            continue
        ways = math.factorial(count)
        likely = 1.0
        for number, chance in zip((both, first, second, neither), chances, strict=True):
            ways //= math.factorial(number)
            likely *= chance**number
        result = paired_difference(*outcomes(both, first, second, neither))
        total += ways * likely
        covered += ways * likely * (result.low <= truth <= result.high)
    assert total == pytest.approx(1)
    assert 0.93 < covered < 0.995  # with so few images it errs on the safe side


def test_pairing_sees_what_separate_intervals_hide() -> None:
    one, two = outcomes(900, 30, 5, 65)
    result = paired_difference(one, two)
    assert result.low > 0
    assert wilson_interval(int(one.sum()), 1000).low < wilson_interval(int(two.sum()), 1000).high


@pytest.mark.parametrize(("first", "second"), [([True], [True, False]), ([], [])])
def test_outcomes_of_different_images_are_refused(first: list[bool], second: list[bool]) -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_difference(np.array(first, dtype=bool), np.array(second, dtype=bool))


def test_accuracy_by_class_is_a_count() -> None:
    correct = np.array([True, False, True, True, False])
    result = class_accuracy(correct, np.array([0, 0, 2, 2, 2]), 4)
    assert [(i.images, i.estimate) for i in result.per_class[0::2]] == [(2, 0.5), (3, pytest.approx(2 / 3))]
    assert [i.images for i in result.per_class[1::2]] == [0, 0]
    assert result.estimate == 0.6
