"""From measurements to a report: intervals, paired tests, ratios, areas."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tla_service.attacks import Attack
from tla_service.attacks.autoattack import ALL_STAGES
from tla_service.evaluation.detection import DetectionResult, detect_misclassified, fit_detector, measure_detection
from tla_service.evaluation.embedding import Embedded
from tla_service.evaluation.geometry import ShiftRatios, shift_ratios
from tla_service.evaluation.intervals import (
    AttackAccuracy,
    Interval,
    class_accuracy,
    paired_difference,
    wilson_interval,
)
from tla_service.evaluation.neighbours import neighbour_accuracy
from tla_service.evaluation.outcomes import ShardOutcome
from tla_service.evaluation.paper_columns import Curve, restart_curve, sweep_curve
from tla_service.evaluation.surrogate import TrainedSurrogate
from tla_service.inference.detector import Rejector
from tla_service.report import schema as rp
from tla_service.report.audit_facts import autoattack_warnings
from tla_service.report.plan import Plan, detection_name, radius_name
from tla_service.report.settings import ReportSettings
from tla_service.report.tasks import EmbeddedImages

# Below this, AutoAttack's lead is what a fair attack of fewer steps leaves; above, the others are weak.
WEAK_GAP = 0.02
_MOST_POINTS = 40


@dataclass
class Findings:
    """What was measured of one model; None for what was left out.

    Attributes:
        outcome: Fates under the table's attacks.
        autoattack: Fates under AutoAttack, on its images.
        embedded: By task name: natural, attacked at each radius, bank.
        detection: Scores' results by name.
        shipped: The model's own detector on the same images.
        shift: Ratios by radius.
        curves: By the name of what varies.
        norms: Smallest perturbations by norm.
        audit: As :meth:`Audit.as_dict`.
        surrogate: What was trained for the audit.
    """

    outcome: ShardOutcome
    autoattack: ShardOutcome | None = None
    embedded: dict[str, EmbeddedImages] = field(default_factory=dict)
    detection: dict[str, DetectionResult] = field(default_factory=dict)
    shipped: rp.ShippedFacts | None = None
    shift: dict[float, ShiftRatios] = field(default_factory=dict)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    norms: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] | None = None
    surrogate: TrainedSurrogate | None = None


def gather(
    results: Mapping[tuple[str, str], Any],
    model: str,
    plan: Plan,
    settings: ReportSettings,
    rejector: Rejector | None = None,
) -> Findings:
    """Sort the results of one model's tasks, and compute what follows from embeddings.

    Args:
        results: By model and task name.
        model: Whose are wanted.
        plan: How they were measured.
        settings: The evaluation's.
        rejector: The detector that the model ships with.
    """
    mine = {name: result for (key, name), result in results.items() if key == model}
    found = Findings(outcome=mine["columns"], autoattack=mine.get("autoattack"), audit=mine.get("audit"))
    found.surrogate = mine.get("surrogate")
    found.embedded = {name: result for name, result in mine.items() if isinstance(result, EmbeddedImages)}
    found.norms = {name: mine[name] for name in ("l0", "l1") if name in mine}
    found.curves = _curves(mine, found.outcome, plan)
    if "natural" in found.embedded and len(found.embedded["natural"].rows):
        natural, bank = (found.embedded[name].embedded for name in ("natural", "bank"))
        chosen = settings.detection
        detector = fit_detector(
            bank,
            covariance=chosen.covariance,
            shrinkage=chosen.shrinkage,
            normalize=chosen.normalize,
            rule=chosen.rule,
        )
        attacked = found.embedded[detection_name(plan)].embedded
        k = min(settings.neighbours.k, len(bank))
        found.detection = detect_misclassified(
            detector, bank, natural, attacked, seed=plan.seed, k=k, metric=settings.neighbours.metric
        )
        if rejector is not None:
            found.shipped = _shipped(rejector, Embedded.joined(natural, attacked), plan.seed)
        levels = {plan.epsilon: radius_name(plan.epsilon), plan.detection.epsilon: detection_name(plan)}
        levels = {epsilon: radius_name(epsilon) for epsilon in plan.shift} | levels
        found.shift = {
            epsilon: shift_ratios(natural, found.embedded[name].embedded) for epsilon, name in sorted(levels.items())
        }
    return found


def _shipped(rejector: Rejector, both: Embedded, seed: int) -> rp.ShippedFacts:
    """The model's own detector on natural and attacked images, at its own threshold."""
    scores, images = rejector.detector.score(both), np.tile(np.arange(len(both) // 2), 2)
    rejected = scores < rejector.threshold
    right, wrong = rejected[both.correct], rejected[~both.correct]
    return rp.ShippedFacts(
        **_score(measure_detection(scores, both.correct, seed=seed, images=images)).model_dump(),
        threshold=rejector.threshold,
        false_rejections=share(wilson_interval(int(right.sum()), len(right))),
        detected=share(wilson_interval(int(wrong.sum()), len(wrong))),
    )


def _curves(mine: Mapping[str, Any], outcome: ShardOutcome, plan: Plan) -> dict[str, dict[str, Curve]]:
    curves: dict[str, dict[str, Curve]] = {}
    if "epsilon-iterative" in mine:
        iterative = f"PGD, {plan.strongest.num_steps} steps"
        curves["epsilon"] = {
            iterative: sweep_curve(mine["epsilon-iterative"], "epsilon"),
            "FGSM, one step": sweep_curve(mine["epsilon-single"], "epsilon"),
        }
        curves["steps"] = {"one start": sweep_curve(mine["steps"], "steps")}
    name = plan.restarted
    if name is not None:
        attack = plan.columns[name]
        restarts = attack.num_restarts
        total = restart_curve(outcome, name, restarts, steps_each=attack.num_steps)
        curves.setdefault("steps", {})[f"{restarts} starts of {attack.num_steps}"] = total
        curves["restarts"] = {name: restart_curve(outcome, name, restarts)}
    return curves


def accuracies(found: Findings, plan: Plan, num_classes: int) -> dict[str, AttackAccuracy]:
    """Accuracy by attack: clean, the table's attacks, the worst of them, AutoAttack."""
    outcome = found.outcome
    names = ["clean", *plan.columns, *plan.transfer]
    table = {name: class_accuracy(outcome.standing(name), outcome.labels, num_classes) for name in names}
    worst = np.logical_and.reduce([outcome.standing(name) for name in names])
    table["worst"] = class_accuracy(worst, outcome.labels, num_classes)
    if found.autoattack is not None:
        standing = found.autoattack.standing("autoattack")
        table["autoattack"] = class_accuracy(standing, found.autoattack.labels, num_classes)
    return table


def share(interval: Interval) -> rp.Share:
    """An interval for the report."""
    return rp.Share(estimate=_number(interval.estimate), low=interval.low, high=interval.high, images=interval.images)


def accuracy_facts(table: Mapping[str, AttackAccuracy]) -> dict[str, rp.Accuracy]:
    """Accuracies for the report."""
    return {
        name: rp.Accuracy(
            **share(result.overall).model_dump(), per_class=tuple(share(interval) for interval in result.per_class)
        )
        for name, result in table.items()
    }


def attack_facts(plan: Plan) -> dict[str, rp.AttackFacts]:
    """How the table's attacks were run."""

    def facts(attack: Attack, *, transfer: bool) -> rp.AttackFacts:
        return rp.AttackFacts(
            kind=attack.kind,
            norm=attack.norm,
            epsilon=attack.epsilon,
            step_size=attack.step_size,
            num_steps=attack.num_steps,
            num_restarts=attack.num_restarts,
            transfer=transfer,
        )

    white = {name: facts(attack, transfer=False) for name, attack in plan.columns.items()}
    return white | {name: facts(attack, transfer=True) for name, attack in plan.transfer.items()}


def autoattack_facts(found: Findings, plan: Plan) -> rp.AutoAttackFacts | None:
    """What AutoAttack says, and whether the other attacks come near it."""
    strong = found.autoattack
    if strong is None:
        return None
    same = np.isin(found.outcome.indices, strong.indices)
    shared = np.isin(strong.indices, found.outcome.indices)
    standing = {name: found.outcome.standing(name)[same] for name in plan.within}
    strongest = min(standing, key=lambda name: int(standing[name].sum()))
    gap = difference_facts(standing[strongest], strong.standing("autoattack")[shared])
    fates = strong.broken_at["autoattack"]
    left_out = strong.left_out
    broken = {stage: int((fates == 1 + place).sum()) for place, stage in enumerate(ALL_STAGES)}
    run = strong.autoattack
    if run is None:  # shards of an earlier version, which ran this one only
        standard = ["apgd-ce", "apgd-t", "fab-t", "square"]
        stages = [stage for stage in ALL_STAGES if broken[stage] or (stage in standard and stage not in left_out)]
    else:
        stages = list(run.stages)
    return rp.AutoAttackFacts(
        version="standard" if run is None else run.version,
        stages=tuple(stages),
        left_out=left_out,
        broken_by={stage: broken[stage] for stage in stages},
        strongest=strongest,
        gap=gap,
        weak=gap.low > 0 and gap.difference > WEAK_GAP,
        warnings=autoattack_warnings(strong),
    )


def gate_facts(found: Findings, plan: Plan, settings: ReportSettings, num_classes: int, images: int) -> rp.GateFacts:
    """The gate's figures for the report.

    Args:
        found: What was measured on the images set aside.
        plan: How.
        settings: The evaluation's.
        num_classes: K.
        images: How many are set aside in the whole test set.
    """
    return rp.GateFacts(
        images=images,
        accuracy=accuracy_facts(accuracies(found, plan, num_classes)),
        detection=detection_facts(found, plan, settings),
    )


def difference_facts(first: Any, second: Any) -> rp.Difference:
    """Two rows of outcomes compared, for the report."""
    found = paired_difference(first, second)
    return rp.Difference(
        difference=found.difference, low=found.low, high=found.high, p_value=found.p_value, images=found.images
    )


def differences(found: Findings, other: Findings, plan: Plan) -> dict[str, rp.Difference]:
    """This model less another, attack by attack, on the same images."""
    names = ["clean", *plan.columns, *plan.transfer]
    pairs = {name: (found.outcome.standing(name), other.outcome.standing(name)) for name in names}
    if found.autoattack is not None and other.autoattack is not None:
        strong, others = found.autoattack, other.autoattack
        pairs["autoattack"] = strong.standing("autoattack"), others.standing("autoattack")
    return {name: difference_facts(*pair) for name, pair in pairs.items()}


def curve_facts(found: Findings, plan: Plan) -> tuple[rp.CurveFacts, ...]:
    """Curves for the report."""
    return tuple(
        rp.CurveFacts(
            attack=f"{plan.restarted if axis == 'restarts' else plan.iterative}: {name}",
            axis=curve.axis,
            x=curve.x,
            accuracy=tuple(share(point) for point in curve.accuracy),
        )
        for axis, curves in found.curves.items()
        for name, curve in curves.items()
    )


def norm_curve(norms: Any, norm: Any) -> Curve:
    """Accuracy against the size of perturbation allowed, from the smallest found for each image."""
    finite = norms[np.isfinite(norms) & (norms > 0)]
    sizes = np.unique(finite) if len(finite) else np.array([1.0])
    if len(sizes) > _MOST_POINTS:
        sizes = np.unique(np.quantile(finite, np.linspace(0, 1, _MOST_POINTS), method="higher"))
    x = (0.0, *(float(size) for size in sizes))
    return Curve(norm, x, tuple(wilson_interval(int((norms > size).sum()), len(norms)) for size in x))


def sparse_facts(found: Findings) -> tuple[rp.SparseFacts, ...]:
    """Minimum norms for the report."""
    facts = []
    for norm, norms in found.norms.items():
        curve = norm_curve(norms, norm)
        points = tuple(share(point) for point in curve.accuracy)
        facts.append(
            rp.SparseFacts(
                norm=norm,
                images=len(norms),
                wrong=int((norms == 0).sum()),
                median=_number(float(np.quantile(norms, 0.5, method="higher"))),
                curve=rp.CurveFacts(attack="FMN", axis=norm, x=curve.x, accuracy=points),
            )
        )
    return tuple(facts)


def detection_facts(found: Findings, plan: Plan, settings: ReportSettings) -> rp.DetectionFacts | None:
    """Detection for the report."""
    if not found.detection:
        return None
    main = found.detection["gaussian"]
    chosen = settings.detection.model_dump(include={"covariance", "shrinkage", "normalize", "rule"})
    attack = {"num_steps": plan.detection.num_steps, "step_size": plan.detection.step_size}
    return rp.DetectionFacts(
        **_score(main).model_dump(),
        epsilon=plan.detection.epsilon,
        num_correct=main.num_correct,
        num_wrong=main.num_wrong,
        baselines={name: _score(result) for name, result in found.detection.items() if name != "gaussian"},
        settings=chosen | attack,
        shipped=found.shipped,
    )


def _score(result: DetectionResult) -> rp.DetectionScore:
    return rp.DetectionScore(
        auc=_number(result.auc), low=_number(result.low), high=_number(result.high), reason=result.reason
    )


def neighbour_facts(found: Findings, plan: Plan, settings: ReportSettings) -> rp.NeighbourFacts | None:
    """Votes of the nearest training images for the report."""
    if not found.embedded:
        return None
    bank = found.embedded["bank"].embedded
    k = min(settings.neighbours.k, len(bank))
    shares = []
    for name in ("natural", radius_name(plan.epsilon)):
        voted = neighbour_accuracy(found.embedded[name].embedded, bank, k=k, metric=settings.neighbours.metric)
        shares.append(rp.Share(estimate=voted.accuracy, low=voted.low, high=voted.high, images=voted.num_queries))
    return rp.NeighbourFacts(k=k, bank=len(bank), clean=shares[0], attacked=shares[1])


def shift_facts(found: Findings) -> tuple[rp.ShiftFacts, ...]:
    """Shift ratios for the report."""
    return tuple(
        rp.ShiftFacts(
            epsilon=epsilon,
            r=_number(ratios.r),
            r_prime=_number(ratios.r_prime),
            left_out_of_r=ratios.left_out_of_r,
            left_out_of_r_prime=ratios.left_out_of_r_prime,
        )
        for epsilon, ratios in found.shift.items()
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
