"""The promotion gate: the rules that a version must satisfy before it may carry an alias."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tla_service.evaluation.results import paired_difference, share_of
from tla_service.evaluation.shards import ShardOutcome
from tla_service.registry.job_settings import GateRules
from tla_service.report.schema import Report
from tla_service.report.settings import ImageCounts

_COMPARED = ("clean", "autoattack")
_BETTER = "train a better version, or change rules."
_COUNTS = {"clean": "images.attacks", "autoattack": "images.autoattack"}  # settings of the evaluation


@dataclass(frozen=True)
class Finding:
    """The outcome of a rule: what was found, what is required, and a remedy, possibly a command: ``run jobs/...``."""

    rule: str
    passed: bool
    explanation: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'passed ' if self.passed else 'REFUSED'} {self.rule:<20} {self.explanation}"


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a version's verified files under one threat model."""

    version: str
    report: Report
    outcomes: Mapping[str, ShardOutcome]  # by attack, with the gate images marked
    trained_on: str | None  # fingerprint in the verified files
    stages: tuple[str, ...]  # of the standard AutoAttack for its network
    again: str  # the command that evaluates it again: run jobs/...

    @property
    def gate(self) -> dict[str, ShardOutcome]:
        """Results of the gate images, by attack."""
        return {name: part.only(part.gate) for name, part in self.outcomes.items() if part.gate is not None}

    @property
    def images(self) -> int:
        """Fewest gate images that a compared attack was run on."""
        return min((len(part.labels) for name, part in self.gate.items() if name in _COMPARED), default=0)


def judge(candidate: Evaluated, rules: GateRules) -> list[Finding]:
    """Apply the rules that concern a version alone."""
    return [
        _figures(candidate),
        _training_data(candidate),
        _standard(candidate),
        _at_least(candidate, "clean", "clean accuracy", "min_clean_accuracy", rules),
        _at_least(candidate, "autoattack", "AutoAttack accuracy", "min_autoattack_accuracy", rules),
        _enough(candidate, rules),
        _audited(candidate, rules),
        _detects(candidate, rules),
    ]


def compare(candidate: Evaluated, holder: Evaluated, alias: str, rules: GateRules) -> list[Finding]:
    """Compare a version with the holder of the alias: under the same threat model, on the same images."""
    mine, other = candidate.report.data.fingerprint, holder.report.data.fingerprint
    name = f"version {holder.version} ({alias})"
    different = [f"data {mine} instead of {other}"] if mine != other else []
    apart = [each for each in _COMPARED if not _same_images(candidate.gate.get(each), holder.gate.get(each))]
    different += [f"different {attack} images" for attack in apart]
    remedy = candidate.again if candidate.images < holder.images else holder.again
    problem = f"not evaluated as {name}: {', '.join(different)}" if different else ""
    comparable = _finding("comparable", problem, f"same images, labels and threat model as {name}", remedy)
    compared = () if different else _COMPARED
    return [comparable, *(_not_worse(candidate, holder, attack, name, rules) for attack in compared)]


def _finding(rule: str, problem: str, fine: str, remedy: str) -> Finding:
    """Passed, and `fine`, unless there is a problem."""
    return Finding(rule, not problem, problem or fine, remedy if problem else "")


def _figures(candidate: Evaluated) -> Finding:
    """Whether the report's figures follow from the per-image results: anyone can edit a report."""
    report, wrong = candidate.report, []
    published = {name: part.only(~part.gate) for name, part in candidate.outcomes.items() if part.gate is not None}
    groups = (report.accuracy, published, ""), (report.gate.accuracy, candidate.gate, " on gate images")
    for accuracy, outcomes, where in groups:
        for attack in _COMPARED:
            stated, outcome = accuracy.get(attack), outcomes.get(attack)
            if stated is None or outcome is None:
                wrong.append(f"{attack} was not run")
                continue
            count, right = len(outcome.labels), int(outcome.standing(attack).sum())
            if stated.images != count or round((stated.estimate or 0.0) * count) != right:
                said = "nothing" if stated.estimate is None else f"{stated.estimate:.2%}"
                said += f" of {stated.images}"
                wrong.append(f"{attack}{where}: the report states {said}, the per-image results {right} of {count}")
    return _finding("figures", "; ".join(dict.fromkeys(wrong)), "match the per-image results", candidate.again)


def _training_data(candidate: Evaluated) -> Finding:
    """A notice only: fingerprints differ by `data.test_limit`, too, and do not tell which images were trained on."""
    trained, evaluated = candidate.trained_on, candidate.report.data.fingerprint
    fine = f"that of the evaluation, {evaluated}"
    if trained not in (None, evaluated):
        fine = f"{trained}, but evaluated on {evaluated}: make sure that it holds none of these test images"
    return _finding("training data", "", fine, "")


def _standard(candidate: Evaluated) -> Finding:
    """Whether the complete standard AutoAttack was run under the report's threat model."""
    outcome, threat = candidate.outcomes.get("autoattack"), candidate.report.threat_model
    run = None if outcome is None else outcome.autoattack
    if run is None:
        return _finding("AutoAttack", "was not run", "", candidate.again)
    wrong = [] if run.version == "standard" else [f"the version is {run.version}, not standard"]
    if (run.norm, run.epsilon) != (threat.norm, threat.epsilon):
        wrong.append(f"it was run with {run.norm} {run.epsilon:g}, but the report is about {threat}")
    wrong += [f"{stage} was not run" for stage in candidate.stages if stage not in run.stages]
    fine = f"standard version under {threat}: {', '.join(run.stages)}"
    return _finding("AutoAttack", "; ".join(wrong), fine, candidate.again)


def _at_least(candidate: Evaluated, attack: str, rule: str, setting: str, rules: GateRules) -> Finding:
    outcome, floor = candidate.gate.get(attack), getattr(rules, setting)
    if outcome is None or not len(outcome.labels):
        return _finding(rule, f"not measured on gate images; at least {floor:.1%} required", "", candidate.again)
    found = share_of(outcome.standing(attack))
    assert found.estimate is not None
    explanation = f"{found.estimate:.1%} ({found.low:.1%} to {found.high:.1%}, {found.images} gate images)"
    return Finding(rule, found.estimate >= floor, f"{explanation}; at least {floor:.1%} required", _BETTER + setting)


def _enough(candidate: Evaluated, rules: GateRules) -> Finding:
    images, there = candidate.images, candidate.report.gate.images
    explanation = f"evaluated on {images} gate images; at least {rules.min_images} required"
    if there < rules.min_images:
        remedy = f"this test set has {there} gate images: lower rules.min_images"
    else:
        found = {name: len(candidate.gate[name].labels) for name in _COMPARED if name in candidate.gate}
        short = [_COUNTS[name] for name, number in found.items() if number < rules.min_images]
        remedy = _with_more(candidate, rules, short)
    return Finding("images", images >= rules.min_images, explanation, remedy)


def _with_more(candidate: Evaluated, rules: GateRules, counts: Iterable[str]) -> str:
    """The command that evaluates again, on enough images for these settings to have the gate images required."""
    data, there = candidate.report.data, max(1, candidate.report.gate.images)
    # A subset contains about its share of them, a quarter more leaves room for rounding by class; but the first image
    # of a class is never one, and every subset begins with those.
    count = max(-(-5 * rules.min_images * data.images // (4 * there)), 4 * len(data.class_names))
    return candidate.again + "".join(f" --{name} {min(data.images, count)}" for name in counts)


def _audited(candidate: Evaluated, rules: GateRules) -> Finding:
    audit, remedy = candidate.report.audit, candidate.again
    if not rules.audit:
        return _finding("audit", "", "not required", "")
    if audit is None:
        return _finding("audit", "the audit for gradient masking was not run", "", remedy)
    report, fewest, problem = candidate.report, min(rules.min_images, ImageCounts().audit), ""
    transferred = [each.accuracy.images for each in report.relatives if each.accuracy is not None]
    measured = {
        "unit_tests": 0 if report.unit_tests is None else report.unit_tests.images,
        # Every relative may have been left out, for the reasons in the report.
        "transfer": min(transferred, default=fewest if report.relatives else 0),
    }
    short = [name for name, count in measured.items() if count < min(fewest, getattr(ImageCounts(), name))]
    if audit.images < fewest:
        problem = f"the audit for gradient masking used {audit.images} images; at least {fewest} required"
        problem += "" if audit.trusted else f"; it failed: {audit.summary}"
    elif not audit.trusted:
        problem = f"the audit for gradient masking failed: {audit.summary}"
        remedy = "see the audit in its report: it may be less robust than measured; train another version"
    elif short:
        counts = ", ".join(f"images.{name} {measured[name]}" for name in short)
        problem = f"checks of the audit were run on too few images: {counts}"
    return _finding("audit", problem, f"passed on {audit.images} images: {audit.summary}", remedy)


def _detects(candidate: Evaluated, rules: GateRules) -> Finding:
    """Detection on gate images, under an attack that knows the detector."""
    measured, required = candidate.report.gate.detection, f"at least {rules.min_detection_auc:g} required"
    if not rules.min_detection_auc:
        return _finding("detection", "", "not required", "")
    score = None if measured is None else measured.attacked
    remedy, more = candidate.again, _with_more(candidate, rules, ["images.adaptive"])
    if measured is not None and score is None:
        problem, remedy = f"the evaluation did not attack the detector on gate images; {required}", more
    elif score is None or score.auc is None:
        why = f" ({score.reason})" if score is not None else ""
        problem = f"AUC was not measured{why}; {required}"
    elif score.images < rules.min_images:
        problem = f"AUC {score.auc:.3f} on {score.images} images; at least {rules.min_images} images required"
        remedy = more
    else:
        explanation = f"AUC {score.auc:.3f} under an adaptive attack of radius {score.epsilon:g}; {required}"
        return Finding("detection", score.auc >= rules.min_detection_auc, explanation, _BETTER + "min_detection_auc")
    return _finding("detection", problem, "", remedy)


def _same_images(first: ShardOutcome | None, second: ShardOutcome | None) -> bool:
    if first is None or second is None or not len(first.labels):
        return False
    return bool(first.indices.tolist() == second.indices.tolist() and first.labels.tolist() == second.labels.tolist())


def _not_worse(candidate: Evaluated, holder: Evaluated, attack: str, name: str, rules: GateRules) -> Finding:
    own, other = (each.gate[attack].standing(attack) for each in (candidate, holder))
    found = paired_difference(own, other)
    is_worse = found.difference < 0 and found.p_value < rules.significance
    points, low, high = (100 * each for each in (found.difference, found.low, found.high))
    explanation = f"{points:+.2f} points ({low:+.2f} to {high:+.2f}) compared with {name}: "
    explanation += f"{(own & ~other).sum()} images gained, {(~own & other).sum()} lost; p = {found.p_value:.2g}"
    broken = {"significance": is_worse, "max_drop": -found.difference > rules.max_drop}
    remedy = _BETTER + " and rules.".join(name for name, is_broken in broken.items() if is_broken)
    return Finding(f"{attack} not worse", not any(broken.values()), explanation, remedy)
