"""How sure an accuracy is: binomial intervals, and two models compared on the same images."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A share with its confidence interval.

    Attributes:
        estimate: The share measured, in [0, 1]; NaN when nothing was counted.
        low: Lower end.
        high: Upper end.
        images: Number of images it was measured on.
    """

    estimate: float
    low: float
    high: float
    images: int


class AttackAccuracy(NamedTuple):
    """Accuracy under one attack.

    Attributes:
        overall: Over all images.
        per_class: By class; a class without images has the estimate NaN.
    """

    overall: Interval
    per_class: tuple[Interval, ...]


class PairedDifference(NamedTuple):
    """Two models on the same images.

    Attributes:
        difference: Accuracy of the first less that of the second, in [-1, 1].
        low: Lower end of its confidence interval.
        high: Upper end.
        p_value: McNemar's exact two-sided test that both are equally often right.
        first_only: Images that only the first gets right.
        second_only: Images that only the second gets right.
        images: Number of images compared.
    """

    difference: float
    low: float
    high: float
    p_value: float
    first_only: int
    second_only: int
    images: int


def wilson_interval(successes: int, count: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a binomial share; unlike the normal one it stays inside [0, 1] and works at 0 and 1.

    Args:
        successes: In [0, count].
        count: Trials; with none the estimate is NaN and the interval [0, 1].
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: The counts are not those of a share.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001 recommend it.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count} is not a share")
    if count == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    from scipy.stats import binomtest

    ends: Any = binomtest(successes, count).proportion_ci(confidence, method="wilson")
    return Interval(successes / count, float(ends.low), float(ends.high), count)


def class_accuracy(correct: BoolArray, labels: npt.NDArray[np.integer[Any]], num_classes: int) -> AttackAccuracy:
    """Accuracy over all images and by class, each with its interval.

    Args:
        correct: Whether each image is classified right (N,).
        labels: True classes (N,), in [0, num_classes).
        num_classes: K.
    """
    rows = [correct[labels == k] for k in range(num_classes)]
    per_class = tuple(wilson_interval(int(row.sum()), len(row)) for row in rows)
    return AttackAccuracy(wilson_interval(int(correct.sum()), len(correct)), per_class)


def paired_difference(first: BoolArray, second: BoolArray, confidence: float = CONFIDENCE) -> PairedDifference:
    """Compare two models image by image.

    Both see the same images, so their accuracies rise and fall together: a paired test sees differences that two
    separate intervals hide.

    Args:
        first: Whether the first model is right on each image (N,).
        second: The same for the second, on the same images in the same order (N,).
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: The arrays differ in length, or are empty.

    Source: McNemar 1947, exact form; the interval is Newcombe 1998 (Statistics in Medicine 17:2635), method 10.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"outcomes {first.shape} and {second.shape}: give one per image, of the same images")
    from scipy.stats import binomtest

    count = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    first_only, second_only = int((first & ~second).sum()), int((~first & second).sum())
    discordant = first_only + second_only
    p_value = float(binomtest(first_only, discordant, 0.5).pvalue) if discordant else 1.0
    one = wilson_interval(both + first_only, count, confidence)
    two = wilson_interval(both + second_only, count, confidence)
    correlation = _correlation(both, first_only, second_only, neither)
    difference = (first_only - second_only) / count
    below = _root(one.estimate - one.low, two.high - two.estimate, correlation)
    above = _root(one.high - one.estimate, two.estimate - two.low, correlation)
    low, high = max(-1.0, difference - below), min(1.0, difference + above)
    return PairedDifference(difference, low, high, p_value, first_only, second_only, count)


def _root(one: float, two: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * correlation * one * two + two**2))


def _correlation(both: int, first_only: int, second_only: int, neither: int) -> float:
    """The phi coefficient of the 2x2 table, with Newcombe's continuity correction where it is positive."""
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    if margins == 0:
        return 0.0
    cross = float(both * neither - first_only * second_only)
    if cross > 0:
        cross = max(0.0, cross - (both + first_only + second_only + neither) / 2)
    return cross / math.sqrt(margins)
