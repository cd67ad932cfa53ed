"""Detection of misclassified images from their embeddings (Mao et al. 2019, section 5.3 and Fig. 5).

One Gaussian a class is fitted to training embeddings; an image whose embedding no class holds likely is rejected. The
task is misclassification: natural and attacked test images together, the correctly classified ones are the positives.
The paper leaves open what the Gaussians are fitted to, their covariance, whether embeddings are scaled, and which
outcome is positive; these are arguments here, and their defaults are this project's choice.
"""

from dataclasses import dataclass, replace
from math import floor
from typing import Literal

import numpy as np
import torch

from tla_service.errors import ConfigError
from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.geometry import Metric, neighbour_score
from tla_service.evaluation.results import (
    AdaptiveDetection,
    BoolArray,
    DetectionScore,
    Selective,
    Share,
    ShippedDetection,
    share_of,
    wilson_interval,
)
from tla_service.inference.detector import Detector, Integers, Rejector, Rule, Scores, unit_rows

Covariance = Literal["full", "tied", "diagonal"]
Shrinkage = Literal["ledoit_wolf", "none"]
_RESAMPLES = 1000
_LARGEST_BYTES = 4 * 10**9


@dataclass(frozen=True)
class RocCurve:
    """How well a score tells correctly classified images (positives) from misclassified ones, threshold by threshold.

    The shares accepted of both rise; they are empty where the curve is undefined.
    """

    score: DetectionScore
    num_correct: int
    num_wrong: int
    false_accepts: Scores
    true_accepts: Scores


def fit_detector(
    training: Embedded,
    *,
    covariance: Covariance = "full",
    shrinkage: Shrinkage = "ledoit_wolf",
    normalize: bool = True,
    rule: Rule = "likeliest",
    variance_floor: float = 1e-6,
) -> Detector:
    """Fit one Gaussian to each class that has training images, by true class.

    A class with a single image takes the shared covariance: one point has none of its own.

    `full` and `diagonal` covariances are by class, `tied` is one around all classes' means, whatever their number.
    `ledoit_wolf` shrinks one that is not diagonal towards a multiple of the identity, as a class with fewer images than
    dimensions needs. Embeddings are scaled to length one if `normalize`: the learned metric ignores length. `rule`
    names the class whose log density is the score; the paper's is the likeliest. `variance_floor`, above 0, is added to
    every variance, as a share of the mean variance within classes, so that units which never vary have a density.
    ConfigError if no class varies at all, so that there is nothing to fit.
    """
    rows = unit_rows(training.embeddings) if normalize else training.embeddings.astype(np.float64)
    classes, place, counts = np.unique(training.labels, return_inverse=True, return_counts=True)
    means = np.stack([rows[training.labels == klass].mean(0) for klass in classes])
    within = rows - means[place]
    mean_variance = float((within**2).mean())
    if mean_variance <= np.finfo(np.float64).eps * float((rows**2).mean()):
        reason = f"the {len(rows)} training embeddings do not vary within any class"
        raise ConfigError("covariance", covariance, reason, "fit to more images of each class")
    lowest = variance_floor * mean_variance
    if covariance == "tied":
        groups = [within]
    else:
        groups = [within[place == at] if count > 1 else within for at, count in enumerate(counts)]
    factors = [_factor(group, covariance, shrinkage, lowest) for group in groups]
    diagonals = [factor if factor.ndim == 1 else np.diagonal(factor) for factor in factors]
    log_determinants = np.resize([np.log(diagonal).sum() for diagonal in diagonals], len(classes))
    return Detector(classes, means, np.stack(factors), log_determinants, normalize, rule)


def check_detector_size(covariance: Covariance, classes: int, width: int) -> None:
    """ConfigError if a detector of embeddings (N, width) would take gigabytes."""
    size = 8 * {"full": classes * width**2, "tied": width**2, "diagonal": classes * width}[covariance]
    if size > _LARGEST_BYTES:
        reason = f"{classes} classes with {width} dimensions each need a detector of {size / 1e9:.3g} GB"
        remedy = "use tied" if covariance == "full" else "use diagonal"
        raise ConfigError("detection.covariance", covariance, reason, remedy)


def threshold_for(scores: Scores, correct: BoolArray, false_rejection_rate: float) -> float:
    """The highest threshold that rejects at most a share, in [0, 1), of the correctly classified images.

    From scores (N,) of validation images, never test images, and whether each is correct (N,); an image is rejected
    when its score is below. ConfigError if the rate is out of range or no image is classified correctly.
    """
    accepted = np.sort(scores[correct])
    if not 0 <= false_rejection_rate < 1 or not len(accepted):
        reason = f"outside [0, 1), or none of the {len(scores)} validation images is classified correctly"
        raise ConfigError("false_rejection_rate", false_rejection_rate, reason, "0.05 rejects one in 20")
    # A product such as 0.29 * 100 falls short of the whole number it means.
    rejected = floor(false_rejection_rate * len(accepted) + 1e-9)
    return float(accepted[min(rejected, len(accepted) - 1)])


def measure_detection(scores: Scores, correct: BoolArray, images: Integers, *, seed: int) -> RocCurve:
    """ROC curve and AUC of a score, with a 95% percentile bootstrap interval, or the reason why there is none.

    Higher scores (N,) are more trustworthy; the positives are the rows that are classified correctly (N,). `images`,
    numbered from 0, is which one each row shows (N,): rows of one image, clean and attacked, are drawn together, for
    they are not independent.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    right, wrong = int(correct.sum()), int((~correct).sum())
    if right == 0 or wrong == 0:
        which = "every image is" if right else "none of the images is"
        reason = f"{which} classified correctly ({right} of {len(correct)}): there is nothing to tell apart"
        return RocCurve(DetectionScore(None, None, None, reason), right, wrong, np.empty(0), np.empty(0))
    low, high = _bootstrap(scores, correct, images, seed)
    false_accepts, true_accepts, _ = roc_curve(correct, scores)
    score = DetectionScore(float(roc_auc_score(correct, scores)), low, high)
    return RocCurve(score, right, wrong, false_accepts, true_accepts)


def detect_misclassified(
    detector: Detector,
    bank: Embedded,
    natural: Embedded,
    adversarial: Embedded,
    *,
    seed: int,
    k: int = 50,
    metric: Metric = "angular",
) -> dict[str, RocCurve]:
    """ROC curves on natural and attacked test images together, by score.

    `gaussian` is the detector, by its rule; `max_softmax` and `neighbours`, minus the distance to the k-th nearest row
    of the bank of training images, are baselines. `adversarial` are the natural images attacked, row by row; the
    paper's radius exceeds that of training.
    """
    both, images = Embedded.joined(natural, adversarial), np.tile(np.arange(len(natural)), 2)
    scores = {
        "gaussian": detector.score(both.embeddings, both.predictions),
        "max_softmax": both.max_softmax,
        "neighbours": neighbour_score(both, bank, k=k, metric=metric),
    }
    return {name: measure_detection(values, both.correct, images, seed=seed) for name, values in scores.items()}


def shipped_detection(rejector: Rejector, both: Embedded, seed: int) -> ShippedDetection:
    """A model's own detector on natural images, then the same attacked, at its own threshold."""
    scores, images = rejector.detector.score(both.embeddings, both.predictions), np.tile(np.arange(len(both) // 2), 2)
    rejected = scores < rejector.threshold
    return ShippedDetection(
        **vars(measure_detection(scores, both.correct, images, seed=seed).score),
        threshold=rejector.threshold,
        false_rejections=_share_of_pairs(rejected[both.correct]),
        detected=_share_of_pairs(rejected[~both.correct]),
    )


def _share_of_pairs(flags: BoolArray) -> Share:
    """The share of True among rows (N,) of which up to two show one image: its interval is that of half as many."""
    half = wilson_interval(int(flags.sum()) // 2, len(flags) // 2)
    return replace(share_of(flags), low=half.low, high=half.high)


def risk_curve(scores: Scores, correct: BoolArray) -> Scores:
    """Share misclassified (N,) among the 1, 2, ..., N images of the highest scores; equal scores share their errors."""
    values, place, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    errors = np.bincount(place, ~correct, minlength=len(values)) / counts
    risks: Scores = np.cumsum(np.repeat(errors, counts)) / np.arange(1, len(scores) + 1)
    return risks


def selective(scores: Scores, correct: BoolArray, threshold: float) -> Selective:
    """What a threshold accepts, and how much of it is right."""
    accepted = scores >= threshold
    aurc = float(risk_curve(scores, correct).mean())
    return Selective(share_of(accepted), share_of(correct[accepted]), share_of(accepted & ~correct), aurc)


def adaptive_detection(
    detector: Detector,
    threshold: float,
    threshold_from: Literal["validation", "training"],
    *,
    natural: Embedded,
    unaware: Embedded,
    evasion: Embedded,
    rejection: Embedded,
    epsilon: float,
    seed: int,
) -> tuple[AdaptiveDetection, dict[str, Scores]]:
    """Figures of a detector that is attacked, and its risk curves (N,) by ``clean``, ``unaware`` and ``adaptive``.

    The same N images, row by row: natural; under an attack that does not know the detector; attacked to evade; attacked
    to be rejected. The adversary may choose: under `adaptive` each image is the misclassified one of the highest score
    among the first three, and as `unaware` leaves it where none is misclassified.
    """
    parts = natural, unaware, evasion, rejection
    clean, plain, evading, low = (detector.score(part.embeddings, part.predictions) for part in parts)
    wrong = ~np.stack([each.correct for each in (natural, unaware, evasion)])
    broken: BoolArray = np.logical_or.reduce(wrong)
    highest = np.where(wrong, [clean, plain, evading], -np.inf).max(0)
    found = {
        "clean": (clean, natural.correct),
        "unaware": (plain, unaware.correct),
        "adaptive": (np.where(broken, highest, plain), ~broken),
    }
    images = np.tile(np.arange(len(natural)), 2)

    def area(name: str) -> DetectionScore:
        scores, correct = (np.concatenate(pair) for pair in zip(found["clean"], found[name], strict=True))
        return measure_detection(scores, correct, images, seed=seed).score

    lowest = np.minimum.reduce([clean, plain, low])
    measured = AdaptiveDetection(
        **vars(area("adaptive")),
        epsilon=epsilon,
        threshold=threshold,
        threshold_from=threshold_from,
        images=len(natural),
        unaware=area("unaware"),
        rejected=share_of(lowest[natural.correct] < threshold),
        false_rejections=share_of(clean[natural.correct] < threshold),
        selective={name: selective(*each, threshold) for name, each in found.items()},
    )
    return measured, {name: risk_curve(*each) for name, each in found.items()}


def _factor(centred: Scores, covariance: Covariance, shrinkage: Shrinkage, lowest: float) -> Scores:
    """Upper triangular W with W Wᵀ the inverse of the rows' covariance; its diagonal (D,) where that is all."""
    from sklearn.covariance import EmpiricalCovariance, LedoitWolf

    if covariance == "diagonal":
        return 1 / np.sqrt((centred**2).mean(0) + lowest)
    estimator = LedoitWolf if shrinkage == "ledoit_wolf" else EmpiricalCovariance
    estimate = estimator(store_precision=False, assume_centered=True).fit(centred).covariance_
    identity = torch.eye(len(estimate), dtype=torch.float64)
    lower = torch.linalg.cholesky(torch.from_numpy(estimate) + lowest * identity)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.T.contiguous().numpy()


def _bootstrap(scores: Scores, correct: BoolArray, images: Integers, seed: int) -> tuple[float, float]:
    """The middle 95% of AUCs over images drawn anew; a draw without both outcomes is left out."""
    # AUC by ranks: sorting once instead of at every draw makes a thousand draws take seconds.
    values, ranks = np.unique(scores, return_inverse=True)
    random, count, found = np.random.default_rng(seed), int(images.max()) + 1, []
    for _ in range(_RESAMPLES):
        weights = np.bincount(random.integers(count, size=count), minlength=count)[images]
        right = np.bincount(ranks, weights * correct, minlength=len(values))
        wrong = np.bincount(ranks, weights * ~correct, minlength=len(values))
        if right.sum() and wrong.sum():
            below = np.cumsum(wrong) - wrong / 2
            found.append(float((right * below).sum() / (right.sum() * wrong.sum())))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
