"""Results of an evaluation, by the names that `report.json` has for them; figures that are undefined are None."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

Axis = Literal["epsilon", "steps", "restarts", "l0", "l1"]
Outcome = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Share:
    """A share of images with its 95% Wilson interval.

    Attributes:
        estimate: In [0, 1]; None where nothing was counted.
        low: Lower end.
        high: Upper end.
        images: Number of images it was measured on.
    """

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
    """Accuracy of one model minus another's on the same images.

    Attributes:
        difference: In [-1, 1].
        low: Lower end of its 95% interval (Newcombe).
        high: Upper end.
        p_value: McNemar's exact two-sided test.
        images: Number of images compared.
    """

    difference: float
    low: float
    high: float
    p_value: float
    images: int


@dataclass(frozen=True)
class Curve:
    """Accuracy along one axis.

    Attributes:
        attack: The attack, then what the curve shows of it.
        axis: What varies: the radius, the total of gradient steps, the restarts, or the size of a sparse perturbation.
        x: Its values, rising.
        accuracy: Accuracy at each.
    """

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
    """Smallest perturbations that a minimum-norm attack found.

    Attributes:
        norm: l0 (changed values of a pixel's channels) or l1.
        images: Number of images.
        wrong: Images misclassified when clean: their perturbation is 0.
        median: Median size over all images; None where most were not broken.
        curve: Accuracy against the size allowed.
    """

    norm: Literal["l0", "l1"]
    images: int
    wrong: int
    median: float | None
    curve: Curve


@dataclass(frozen=True)
class DetectionScore:
    """How well a score finds misclassified images: area under the ROC curve with its 95% bootstrap interval.

    Attributes:
        auc: In [0, 1]; None where undefined.
        low: Lower end; None likewise, or without resampling.
        high: Upper end.
        reason: Why the AUC is undefined, or empty.
    """

    auc: float | None
    low: float | None
    high: float | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ShippedDetection(DetectionScore):
    """The detector that travels with the model, at the threshold it ships with.

    Attributes:
        threshold: Images below it are rejected.
        false_rejections: Correctly classified test images that it rejects, natural and attacked together.
        detected: Misclassified ones that it rejects.
    """

    threshold: float
    false_rejections: Share
    detected: Share


@dataclass(frozen=True, kw_only=True)
class Detection(DetectionScore):
    """Detection of misclassified images, natural and attacked together; `auc` is that of the class Gaussians.

    These are fitted anew, by the settings of the evaluation; `shipped` is the detector that the model ships with.

    Attributes:
        epsilon: Radius of the attacked images.
        num_correct: Correctly classified ones among both.
        num_wrong: Misclassified ones.
        baselines: The same for other scores.
        settings: The choices that the paper leaves open.
        shipped: The model's own detector; None where it has none.
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

    Attributes:
        epsilon: The radius.
        r: None where no class has a ratio.
        r_prime: Likewise.
        left_out_of_r: Classes that `r` does without.
        left_out_of_r_prime: Classes that `r_prime` does without.
    """

    epsilon: float
    r: float | None
    r_prime: float | None
    left_out_of_r: int
    left_out_of_r_prime: int


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What is checked.
        figure: What was measured; None when the check was not run.
        threshold: Where it fails.
        outcome: Its result.
        statement: The figure in words, or why the check was not run.
        meaning: What a failure means.
    """

    name: str
    figure: float | None
    threshold: float
    outcome: Outcome
    statement: str
    meaning: str


@dataclass(frozen=True)
class SurrogateFacts:
    """How a surrogate was trained for the audit, as none was given.

    Attributes:
        architecture: Name of the network.
        images: Number of training images.
        steps: Optimizer steps.
        seconds: Wall time of its training.
        clean_accuracy: On held-out training images; None without any.
        held_out: Their number.
    """

    architecture: str
    images: int
    steps: int
    seconds: float
    clean_accuracy: float | None
    held_out: int


@dataclass(frozen=True)
class Audit:
    """Whether the robustness is real.

    Attributes:
        trusted: Whether no check failed. One that was not run says nothing, and is shown as such.
        images: How many images it was measured on.
        checks: In the order of running.
        surrogate: What attacks were transferred from, if it was trained for this audit.
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
