"""Results of an evaluation by their names in `report.json` (None: undefined), and how certain they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

Axis = Literal["epsilon", "steps", "restarts", "l0", "l1"]
Outcome = Literal["passed", "failed", "not run"]
BoolArray = npt.NDArray[np.bool_]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A share of images: estimate in [0, 1] (None where nothing was counted) and its 95% Wilson interval."""

    estimate: float | None
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class Accuracy(Share):
    """Accuracy under one attack, or on clean images; `per_class` is in label order."""

    per_class: tuple[Share, ...] = ()


@dataclass(frozen=True)
class Difference:
    """Accuracy of one model minus another's on the same images, its 95% interval (Newcombe), McNemar's exact p."""

    difference: float
    low: float
    high: float
    p_value: float
    images: int


@dataclass(frozen=True)
class Curve:
    """Accuracy at rising values x of one axis; `attack` is the attack, then what the curve shows of it."""

    attack: str
    axis: Axis
    x: tuple[float, ...]
    accuracy: tuple[Share, ...]


@dataclass(frozen=True)
class MinimumNorms:
    """Smallest perturbations found by a minimum-norm attack.

    L0 counts changed values of a pixel's channels. The perturbation is 0 for the `wrong` images, misclassified when
    clean; `median` is over all images, None where most were not broken.
    """

    norm: Literal["l0", "l1"]
    images: int
    wrong: int
    median: float | None
    curve: Curve


@dataclass(frozen=True)
class DetectionScore:
    """Area under the ROC curve in [0, 1] and its 95% bootstrap interval; where it is undefined, None and why."""

    auc: float | None
    low: float | None
    high: float | None
    reason: str = ""


@dataclass(frozen=True)
class Selective:
    """A classifier that rejects images: `coverage` is the accepted share, `accuracy` that among accepted images.

    `evaded` is the share of all images that are misclassified and accepted. `aurc` is the area under the risk-coverage
    curve: the share misclassified among the accepted images, averaged over all coverages (Geifman et al. 2019); lower
    is better.
    """

    coverage: Share
    accuracy: Share
    evaded: Share
    aurc: float


@dataclass(frozen=True, kw_only=True)
class AdaptiveDetection(DetectionScore):
    """Detection under an adaptive attack, on classifier and detector together, at the threat model's `epsilon`.

    The AUC is of natural and attacked images together, as that under `unaware`, the strongest PGD at the same radius,
    which does not know the detector. Images that score below `threshold`, which was fixed on `threshold_from` images,
    are rejected. Of the images that are classified correctly without an attack, `false_rejections` are rejected without
    an attack, `rejected` under one that aims at that. `selective` is by ``clean``, ``unaware`` and ``adaptive``.
    """

    epsilon: float
    threshold: float
    threshold_from: Literal["validation", "training"]
    images: int
    unaware: DetectionScore
    rejected: Share
    false_rejections: Share
    selective: dict[str, Selective]


@dataclass(frozen=True, kw_only=True)
class ShippedDetection(DetectionScore):
    """The detector that ships with the model: images that score below `threshold` are rejected.

    `detected` is the rejected share of misclassified images, `false_rejections` that of correctly classified ones,
    natural and attacked together.
    """

    threshold: float
    false_rejections: Share
    detected: Share
    adaptive: AdaptiveDetection | None = None


@dataclass(frozen=True, kw_only=True)
class Detection(DetectionScore):
    """Detection of misclassified images, natural and attacked (at `epsilon`) together, by class Gaussians.

    These are fitted anew, by the settings of the evaluation; `shipped` is the detector that the model ships with.
    """

    epsilon: float
    num_correct: int
    num_wrong: int
    baselines: dict[str, DetectionScore]
    settings: dict[str, str | float | bool]
    shipped: ShippedDetection | None = None
    adaptive: AdaptiveDetection | None = None

    @property
    def attacked(self) -> AdaptiveDetection | None:
        """The adaptive attack on the detector that users get: the shipped one, else the one fitted anew."""
        return (self.shipped or self).adaptive


@dataclass(frozen=True)
class Neighbours:
    """Accuracy of a vote among the k nearest of `bank` training images, on clean and on attacked test images."""

    k: int
    bank: int
    clean: Share
    attacked: Share


@dataclass(frozen=True)
class Shift:
    """Shift ratios at one radius, means over classes that have one: r (higher is better) and r' (lower is better)."""

    epsilon: float
    r: float | None
    r_prime: float | None
    left_out_of_r: int
    left_out_of_r_prime: int


@dataclass(frozen=True)
class Check:
    """One check: what was measured (None: not run), where it fails, the figure in words, and what a failure means."""

    name: str
    figure: float | None
    threshold: float
    outcome: Outcome
    statement: str
    meaning: str

    @classmethod
    def of(
        cls, name: str, figure: float | None, threshold: float, statement: str, meaning: str, *, least: bool = False
    ) -> Self:
        """A check whose threshold is the most that its figure may be, or the `least`."""
        outcome: Outcome = "not run"
        if figure is not None:
            outcome = "passed" if (figure >= threshold if least else figure <= threshold) else "failed"
        return cls(name, figure, threshold, outcome, statement, meaning)


@dataclass(frozen=True)
class SurrogateFacts:
    """How the audit's own surrogate was trained; its accuracy is on held-out training images, None without any."""

    architecture: str
    images: int
    steps: int
    seconds: float
    clean_accuracy: float | None
    held_out: int


@dataclass(frozen=True)
class Audit:
    """Whether the robustness is real: trusted if no check failed; `surrogate` is the one trained for it, if any."""

    trusted: bool
    images: int
    checks: tuple[Check, ...]
    surrogate: SurrogateFacts | None = None

    @classmethod
    def of(cls, checks: Sequence[Check], images: int, surrogate: SurrogateFacts | None = None) -> Self:
        """An audit with these checks."""
        return cls(all(check.outcome != "failed" for check in checks), images, tuple(checks), surrogate)

    @property
    def summary(self) -> str:
        """How many checks had each outcome; those that did not pass by name."""
        parts = [f"{sum(check.outcome == 'passed' for check in self.checks)} of {len(self.checks)} checks passed"]
        for outcome in ("failed", "not run"):
            names = [check.name for check in self.checks if check.outcome == outcome]
            if names:
                parts.append(f"{len(names)} {outcome} ({', '.join(names)})")
        return ", ".join(parts)


@dataclass(frozen=True)
class AttackTest:
    """How often an attack found an example planted for it; `judged` tells whether it is held to the bar."""

    attack: str
    found: Share
    judged: bool


@dataclass(frozen=True)
class UnitTests:
    """Attack unit tests on `images` test images: the share of planted examples found, at random and by each attack.

    `bar` is the least rate of an attack that is judged; `why` is why nothing can be judged.
    """

    images: int
    random: Share
    attacks: tuple[AttackTest, ...]
    bar: float
    why: str = ""


@dataclass(frozen=True)
class Relative:
    """Accuracy on examples crafted on a relative of the model; without, `why` the relative was left out.

    `source` is ``pretrained``, ``last``, ``average`` or ``natural``; `about` describes it in words.
    """

    source: str
    about: str
    accuracy: Share | None = None
    why: str = ""


@cache
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
    per_class = tuple(share_of(correct[labels == k]) for k in range(num_classes))
    return Accuracy(**vars(share_of(correct)), per_class=per_class)


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
