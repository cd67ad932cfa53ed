"""Results of an evaluation, by the names that `report.json` has for them; figures that are undefined are None."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

Axis = Literal["epsilon", "steps", "restarts", "l0", "l1"]
Outcome = Literal["passed", "failed", "not run"]


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

    @property
    def label(self) -> str:
        """What the curve shows of its attack."""
        return self.attack.partition(": ")[2]


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


@dataclass(frozen=True, kw_only=True)
class ShippedDetection(DetectionScore):
    """The detector that ships with the model: images that score below `threshold` are rejected.

    `detected` is the rejected share of misclassified images, `false_rejections` that of correctly classified ones,
    natural and attacked together.
    """

    threshold: float
    false_rejections: Share
    detected: Share


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


@dataclass(frozen=True)
class Neighbours:
    """Accuracy of a vote among the k nearest of `bank` training images, on clean and on attacked test images."""

    k: int
    bank: int
    clean: Share
    attacked: Share


@dataclass(frozen=True)
class Shift:
    """Shift ratios at one radius, means over classes: r (higher is better) and r' (lower is better).

    None where no class has a ratio; `left_out_of_...` counts the classes without one.
    """

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
    """Whether the robustness is real: trusted if no check failed. One that was not run says nothing.

    `surrogate` is what attacks were transferred from, if it was trained for this audit.
    """

    trusted: bool
    images: int
    checks: tuple[Check, ...]
    surrogate: SurrogateFacts | None = None

    @classmethod
    def of(cls, checks: Sequence[Check], images: int, surrogate: SurrogateFacts | None = None) -> Self:
        """An audit with these checks."""
        return cls(all(check.outcome != "failed" for check in checks), images, tuple(checks), surrogate)

    def named(self, outcome: Outcome) -> list[str]:
        """Names of the checks with an outcome."""
        return [check.name for check in self.checks if check.outcome == outcome]

    @property
    def summary(self) -> str:
        """How many checks had each outcome; those that did not pass by name."""
        parts = [f"{len(self.named('passed'))} of {len(self.checks)} checks passed"]
        outcomes: tuple[Outcome, ...] = ("failed", "not run")
        for outcome in outcomes:
            names = self.named(outcome)
            if names:
                parts.append(f"{len(names)} {outcome} ({', '.join(names)})")
        return ", ".join(parts)
