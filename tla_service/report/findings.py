"""From measurements to a report: intervals, paired tests, ratios, areas."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tla_service.attacks.autoattack import ZERO_GRADIENT
from tla_service.attacks.minimum_norm import SparseNorm
from tla_service.errors import ConfigError
from tla_service.evaluation import detection as dt
from tla_service.evaluation import results as rs
from tla_service.evaluation.adaptive import AIMS
from tla_service.evaluation.beyond import Calibration, Corruptions, calibrate, summarise_corruptions
from tla_service.evaluation.certified import Certified, summarise
from tla_service.evaluation.embedding import Embedded, EmbeddedImages
from tla_service.evaluation.geometry import ShiftRatios, shift_ratios
from tla_service.evaluation.paper import restart_curve, sweep_curve
from tla_service.evaluation.shards import ShardOutcome, standing_under_all
from tla_service.evaluation.suite import SPARSE_NORMS, minimum_norms_of
from tla_service.evaluation.unit_tests import unit_test_check
from tla_service.inference.detector import Detector, Rejector, Scores
from tla_service.report.plan import TRANSFER, Plan, adaptive_name, detection_name, radius_name, smoothing_sigma

# Of correctly classified validation images, by a detector fitted here: the default of those that models ship with.
_FALSE_REJECTION_RATE = 0.05
_FITTED = {"covariance", "shrinkage", "normalize", "rule"}


@dataclass
class Findings:
    """What was measured of one model; None or empty for what was left out.

    `outcome` holds per-image results under the table's attacks, `autoattack` those under AutoAttack on its images;
    `embedded` is by task name, `rocs` by the score that detects, `shift` by radius; `risks` are the risk curves of the
    model's own detector, else of the one fitted here, by attack. `transfer` has per-image results on examples crafted
    on the model's relatives, by source.
    """

    outcome: ShardOutcome
    autoattack: ShardOutcome | None = None
    embedded: dict[str, EmbeddedImages] = field(default_factory=dict)
    rocs: dict[str, dt.RocCurve] = field(default_factory=dict)
    detection: rs.Detection | None = None
    risks: dict[str, Scores] = field(default_factory=dict)
    shift: dict[float, ShiftRatios] = field(default_factory=dict)
    curves: tuple[rs.Curve, ...] = ()
    norms: tuple[rs.MinimumNorms, ...] = ()
    sizes: dict[SparseNorm, npt.NDArray[np.float64]] = field(default_factory=dict)
    other_norm: ShardOutcome | None = None
    corruptions: Corruptions | None = None
    calibration: dict[Literal["clean", "attacked"], Calibration] = field(default_factory=dict)
    audit: rs.Audit | None = None
    unit_tests: rs.UnitTests | None = None
    transfer: ShardOutcome | None = None
    certified: Certified | None = None


def gather(
    results: Mapping[tuple[str, str], Any], model: str, plan: Plan, rejector: Rejector | None = None
) -> Findings:
    """Sort the results of one model's tasks, and compute what follows from embeddings."""
    mine = {name: result for (key, name), result in results.items() if key == model}
    found = Findings(outcome=mine["columns"], autoattack=mine.get("autoattack"))
    found.embedded = {name: result for name, result in mine.items() if isinstance(result, EmbeddedImages)}
    found.sizes = {norm: mine[norm] for norm in SPARSE_NORMS if norm in mine}
    found.norms = tuple(minimum_norms_of(sizes, norm) for norm, sizes in found.sizes.items())
    found.other_norm = mine.get("other-norm")
    if "corruptions" in mine:
        found.corruptions = summarise_corruptions(mine["corruptions"])
    found.curves = _curves(mine, found.outcome, plan)
    found.transfer = transferred(results, model)
    strong = found.autoattack
    if "certified" in mine:
        standing = None
        if strong is not None:
            standing = dict(zip(strong.indices.tolist(), strong.standing("autoattack").tolist(), strict=True))
        found.certified = summarise(
            mine["certified"],
            norm=plan.norm,
            epsilon=plan.epsilon,
            sigma=smoothing_sigma(plan),
            samples=plan.settings.certificate.samples,
            alpha=plan.settings.certificate.alpha,
            standing=standing,
        )
    if "audit" in mine:
        found.unit_tests = mine.get("unit-tests")
        more = (
            _restarts_check(found.outcome, plan),
            unit_test_check(found.unit_tests),
            _transfer_check(found, plan),
            _objection_check(strong),
        )
        surrogate = mine["surrogate"].facts if "surrogate" in mine else None
        found.audit = rs.Audit.of((*mine["audit"].checks, *more), mine["audit"].images, surrogate)
    if "natural" in found.embedded and len(found.embedded["natural"].rows):
        _detect(found, plan, rejector)
        natural = found.embedded["natural"].embedded
        attacked = found.embedded[radius_name(plan.epsilon)].embedded
        found.calibration = {"clean": calibrate(natural), "attacked": calibrate(attacked)}
        levels = {epsilon: radius_name(epsilon) for epsilon in (*plan.shift, plan.epsilon)}
        levels[plan.detection.epsilon] = detection_name(plan)
        found.shift = {
            epsilon: shift_ratios(natural, found.embedded[name].embedded) for epsilon, name in sorted(levels.items())
        }
    return found


def fitted_detector(bank: EmbeddedImages, plan: Plan) -> Detector:
    """The detector of the evaluation, fitted to embedded training images."""
    return dt.fit_detector(bank.embedded, **plan.settings.detection.model_dump(include=_FITTED))


def _adaptive(found: Findings, plan: Plan, detector: Detector, threshold: float | None) -> rs.AdaptiveDetection | None:
    """What attacks on a detector found; the threshold of one that has none is fixed here. None if it was not run."""
    names = [adaptive_name(aim, detector) for aim in AIMS]
    if names[0] not in found.embedded or not len(found.embedded[names[0]].rows):
        return None
    source: Literal["validation", "training"] = "validation"
    if threshold is None:
        source = "validation" if "validation" in found.embedded else "training"
        held_out = found.embedded["validation" if source == "validation" else "bank"].embedded
        if not held_out.correct.any():
            return None
        scores = detector.score(held_out.embeddings, held_out.predictions)
        threshold = dt.threshold_for(scores, held_out.correct, _FALSE_REJECTION_RATE)
    evasion, rejection = (found.embedded[name] for name in names)
    natural, unaware = (
        each.only(np.isin(each.rows, evasion.rows)).embedded
        for each in (found.embedded["natural"], found.embedded[radius_name(plan.epsilon)])
    )
    measured, found.risks = dt.adaptive_detection(
        detector,
        threshold,
        source,
        natural=natural,
        unaware=unaware,
        evasion=evasion.embedded,
        rejection=rejection.embedded,
        epsilon=plan.epsilon,
        seed=plan.seed,
    )
    return measured


def _detect(found: Findings, plan: Plan, rejector: Rejector | None) -> None:
    natural, bank, attacked = (found.embedded[name].embedded for name in ("natural", "bank", detection_name(plan)))
    chosen = plan.settings.detection.model_dump(include=_FITTED)
    k, metric = min(plan.settings.neighbours.k, len(bank)), plan.settings.neighbours.metric
    try:
        detector = fitted_detector(found.embedded["bank"], plan)
    except ConfigError as error:
        # A collapsed network embeds all images alike; the rest of its evaluation stands.
        right = int(natural.correct.sum() + attacked.correct.sum())
        found.detection = rs.Detection(
            **vars(rs.DetectionScore(None, None, None, error.reason)),
            epsilon=plan.detection.epsilon,
            num_correct=right,
            num_wrong=2 * len(natural) - right,
            baselines={},
            settings=chosen,
        )
        return
    adaptive = _adaptive(found, plan, detector, None)
    found.rocs = dt.detect_misclassified(detector, bank, natural, attacked, seed=plan.seed, k=k, metric=metric)
    main = found.rocs["gaussian"]
    shipped = None
    if rejector is not None:
        shipped = dt.shipped_detection(rejector, Embedded.joined(natural, attacked), plan.seed)
        shipped = replace(shipped, adaptive=_adaptive(found, plan, rejector.detector, rejector.threshold))
    found.detection = rs.Detection(
        **vars(main.score),
        epsilon=plan.detection.epsilon,
        num_correct=main.num_correct,
        num_wrong=main.num_wrong,
        baselines={name: roc.score for name, roc in found.rocs.items() if name != "gaussian"},
        settings=chosen | {"num_steps": float(plan.detection.num_steps), "step_size": plan.detection.step_size},
        shipped=shipped,
        adaptive=adaptive,
    )


def _curves(mine: Mapping[str, Any], outcome: ShardOutcome, plan: Plan) -> tuple[rs.Curve, ...]:
    curves = []
    if "epsilon-iterative" in mine:
        pgd = f"{plan.iterative}: PGD, {plan.strongest.num_steps} steps"
        curves = [
            sweep_curve(mine["epsilon-iterative"], "epsilon", pgd),
            sweep_curve(mine["epsilon-single"], "epsilon", f"{plan.iterative}: FGSM, one step"),
            sweep_curve(mine["steps"], "steps", f"{plan.iterative}: one start"),
        ]
    name = plan.restarted
    if name is not None:
        steps, restarts = plan.columns[name].num_steps, plan.columns[name].num_restarts
        total = f"{name}: {restarts} starts of {steps}"
        curves.append(restart_curve(outcome, name, restarts, total, steps_each=steps))
        curves.append(restart_curve(outcome, name, restarts, f"{name}: {name}"))
    return tuple(curves)


def _restarts_check(outcome: ShardOutcome, plan: Plan) -> rs.Check:
    """Whether one start of the table's restarted PGD finds about as much as all of them."""
    name, most = "restarts_gain_little", 0.05
    meaning = "where the attack begins decides what it finds: the loss surface is rough, and one start says little"
    if plan.restarted is None:
        return rs.Check.of(name, None, most, "no PGD of the table has restarts", meaning)
    first, last = (float(outcome.standing(plan.restarted, count).mean()) for count in (1, None))
    count = plan.columns[plan.restarted].num_restarts
    statement = f"{plan.restarted}: {first:.1%} stand after one start, {last:.1%} after {count}"
    return rs.Check.of(name, first - last, most, statement, meaning)


def _objection_check(strong: ShardOutcome | None) -> rs.Check:
    """AutoAttack's warnings about its own figure; zero gradients have a check of their own."""
    name, meaning = "autoattack_raises_no_objection", "AutoAttack considers its own figure unreliable for this network"
    if strong is None:
        return rs.Check.of(name, None, 0.0, "AutoAttack was not run", meaning)
    objections = float(sum(warning != ZERO_GRADIENT for warning in strong.warnings))
    return rs.Check.of(name, objections, 0.0, "; ".join(strong.warnings) or "AutoAttack gave no warning", meaning)


def transferred(results: Mapping[tuple[str, str], Any], model: str) -> ShardOutcome | None:
    """Results on examples crafted on a model's relatives, as one outcome; None without any."""
    parts = [result for (key, name), result in results.items() if key == model and name.startswith(TRANSFER)]
    broken_at = {name: values for part in parts for name, values in part.broken_at.items()}
    return replace(parts[0], broken_at=broken_at) if parts else None


def _transfer_check(found: Findings, plan: Plan) -> rs.Check:
    """Whether examples of relatives break images that no white-box attack of the table breaks."""
    name, most = "white_box_against_relatives", 0.02
    meaning = "who has a relative of the network does better than who has the network itself: its gradients are masked"
    transfer = found.transfer
    # The table may have been measured on fewer images.
    shared = 0 if transfer is None else int(np.isin(transfer.indices, found.outcome.indices).sum())
    if transfer is None or not shared:
        return rs.Check.of(name, None, most, "no relative was attacked", meaning)
    white = np.logical_and.reduce([found.outcome.standing(attack) for attack in plan.within])
    standing = np.isin(transfer.indices, found.outcome.indices[white])
    fell = standing & ~standing_under_all(transfer)
    fell_to = {source: standing & ~transfer.standing(source) for source in transfer.broken_at if source != "clean"}
    sources = ", ".join(f"{source} {rows.sum()}" for source, rows in fell_to.items())
    statement = (
        f"{int(fell.sum())} of {int(standing.sum())} images that stand in the white box fall to examples crafted on "
        f"relatives ({sources})"
    )
    return rs.Check.of(name, float(fell.sum()) / shared, most, statement, meaning)
