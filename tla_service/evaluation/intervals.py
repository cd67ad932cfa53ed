"""How certain an accuracy is: binomial intervals, and paired comparisons of two models."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tla_service.evaluation.results import Accuracy, Difference, Share

BoolArray = npt.NDArray[np.bool_]
CONFIDENCE = 0.95


def wilson_interval(successes: int, count: int) -> Share:
    """Wilson's score interval of a binomial share; unlike the normal one it stays inside [0, 1] and works at 0 and 1.

    Without trials there is no estimate, and the interval is [0, 1]. ValueError unless successes are in [0, count].
    Source: Wilson 1927; recommended by Brown, Cai and DasGupta 2001.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count} is not a share")
    if count == 0:
        return Share(None, 0.0, 1.0, 0)
    from scipy.stats import binomtest

    ends: Any = binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return Share(successes / count, float(ends.low), float(ends.high), count)


def share_of(flags: BoolArray) -> Share:
    """The share of True among flags (N,)."""
    return wilson_interval(int(flags.sum()), len(flags))


def class_accuracy(correct: BoolArray, labels: npt.NDArray[np.integer[Any]], num_classes: int) -> Accuracy:
    """Accuracy over all images and by class, from correctness (N,) and true classes (N,) in [0, num_classes)."""
    whole = share_of(correct)
    per_class = tuple(share_of(correct[labels == k]) for k in range(num_classes))
    return Accuracy(whole.estimate, whole.low, whole.high, whole.images, per_class)


def paired_difference(first: BoolArray, second: BoolArray) -> Difference:
    """Compare two models by whether each is right (N,) on the same images, in the same order.

    Their accuracies rise and fall together: a paired test sees differences that two separate intervals hide.
    ValueError if the arrays differ in length or are empty. Source: McNemar 1947, exact form; the interval is Newcombe
    1998 (Statistics in Medicine 17:2635), method 10.
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
    share_one, share_two = (both + first_only) / count, (both + second_only) / count
    one, two = share_of(first), share_of(second)
    correlation = _correlation(both, first_only, second_only, neither)
    difference = (first_only - second_only) / count
    below = _root(share_one - one.low, two.high - share_two, correlation)
    above = _root(one.high - share_one, share_two - two.low, correlation)
    return Difference(difference, max(-1.0, difference - below), min(1.0, difference + above), p_value, count)


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
