"""The gate of promotion: what a version must show, rule by rule, before it may carry an alias."""

from collections.abc import Mapping
from dataclasses import dataclass

from tla_service.errors import UserError
from tla_service.evaluation.intervals import paired_difference, share_of
from tla_service.evaluation.outcomes import ShardOutcome
from tla_service.evaluation.results import Accuracy
from tla_service.registry.gate_rules import GateRules
from tla_service.report.schema import Report
from tla_service.report.settings import ImageCounts

_COMPARED = ("clean", "autoattack")
_COUNTS = {"clean": "images.attacks", "autoattack": "images.autoattack"}  # settings of the evaluation


@dataclass(frozen=True)
class Finding:
    """A rule and what came of it.

    Attributes:
        rule: Its name.
        passed: Whether the version satisfies it.
        explanation: What was found, and what was wanted.
        remedy: What to do about a refusal; a command where one helps: ``run jobs/...``.
    """

    rule: str
    passed: bool
    explanation: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'passed ' if self.passed else 'REFUSED'} {self.rule:<20} {self.explanation}"


@dataclass(frozen=True)
class Evaluated:
    """A version whose files are intact, with the evaluation of these files under one threat model.

    Attributes:
        version: Its number.
        report: The report.
        outcomes: Result of each image by attack, with the images set aside for the gate marked.
        stages: Parts of the standard AutoAttack that run on this network.
        again: What evaluates it again: ``run jobs/...``.
    """

    version: str
    report: Report
    outcomes: Mapping[str, ShardOutcome]
    stages: tuple[str, ...]
    again: str

    @property
    def gate(self) -> dict[str, ShardOutcome]:
        """Results of the images set aside for the gate, by attack."""
        return {name: part.only(part.gate) for name, part in self.outcomes.items() if part.gate is not None}

    @property
    def gate_images(self) -> int:
        """How many test images are set aside."""
        facts = self.report.gate
        return len(self.gate["clean"].labels) if facts is None else facts.images

    @property
    def published(self) -> dict[str, ShardOutcome]:
        """Results of the images that the report's figures are of, by attack."""
        if self.report.gate is None:
            return dict(self.outcomes)
        return {name: part.only(~part.gate) for name, part in self.outcomes.items() if part.gate is not None}


def judge(candidate: Evaluated, rules: GateRules) -> list[Finding]:
    """Hold a version against the rules that concern it alone."""
    return [
        _figures(candidate),
        _standard(candidate),
        _at_least(candidate, "clean", "clean accuracy", "min_clean_accuracy", rules.min_clean_accuracy),
        _at_least(
            candidate, "autoattack", "AutoAttack accuracy", "min_autoattack_accuracy", rules.min_autoattack_accuracy
        ),
        _enough(candidate, rules),
        _audited(candidate, rules),
        _detects(candidate, rules),
    ]


def compare(candidate: Evaluated, holder: Evaluated, alias: str, rules: GateRules) -> list[Finding]:
    """Hold a version against the one that carries the alias: the same threat model, on the same images."""
    mine, other = candidate.report.data.fingerprint, holder.report.data.fingerprint
    name = f"version {holder.version} ({alias})"
    different = [f"data {mine} against {other}"] if mine != other else []
    different += [
        f"other {attack} images"
        for attack in _COMPARED
        if not _same_images(candidate.gate.get(attack), holder.gate.get(attack))
    ]
    explanation = ", ".join(different) or "the same images, labels and threat model"
    remedy = "" if not different else candidate.again if _images(candidate) < _images(holder) else holder.again
    comparable = Finding("comparable", not different, f"evaluated as {name}: {explanation}", remedy)
    if different:
        return [comparable]
    return [comparable, *(_not_worse(candidate, holder, attack, name, rules) for attack in _COMPARED)]


def refused(rule: str, error: UserError) -> Finding:
    """A rule that a version fails because something cannot be used."""
    return Finding(rule, passed=False, explanation=f"{error.reason}; {error.remedy}", remedy=error.remedy)


def _figures(candidate: Evaluated) -> Finding:
    """Whether the report's figures follow from the images' results: a report is a text that anyone can edit."""
    groups = [(candidate.report.accuracy, candidate.published, "")]
    if candidate.report.gate is not None:
        groups.append((candidate.report.gate.accuracy, candidate.gate, " of the gate"))
    wrong = []
    for accuracy, outcomes, whose in groups:
        for attack in _COMPARED:
            stated, outcome = accuracy.get(attack), outcomes.get(attack)
            if stated is None or outcome is None:
                wrong.append(f"{attack} was not run")
                continue
            count, right = len(outcome.labels), int(outcome.standing(attack).sum())
            if stated.images != count or round((stated.estimate or 0.0) * count) != right:
                wrong.append(
                    f"{attack}{whose}: the report says {_percent(stated)}, the images' results {right} of {count}"
                )
    explanation = "; ".join(dict.fromkeys(wrong)) or "follow from the results of the images"
    return Finding("figures", not wrong, explanation, candidate.again if wrong else "")


def _standard(candidate: Evaluated) -> Finding:
    """Whether AutoAttack was run as it should be: the standard version, all of it, under the report's threat model."""
    outcome, threat = candidate.outcomes.get("autoattack"), candidate.report.threat_model
    run = None if outcome is None else outcome.autoattack
    if run is None:
        return Finding("AutoAttack", passed=False, explanation="was not run", remedy=candidate.again)
    wrong = [] if run.version == "standard" else [f"the version is {run.version}"]
    if (run.norm, run.epsilon) != (threat.norm, threat.epsilon):
        wrong.append(f"it was run with {run.norm} {run.epsilon:g}, the report is about {threat}")
    wrong += [f"{stage} was not run" for stage in candidate.stages if stage not in run.stages]
    explanation = "; ".join(wrong) or f"the standard version under {threat}: {', '.join(run.stages)}"
    return Finding("AutoAttack", not wrong, explanation, candidate.again if wrong else "")


def _at_least(candidate: Evaluated, attack: str, rule: str, setting: str, floor: float) -> Finding:
    outcome = candidate.gate.get(attack)
    if outcome is None or not len(outcome.labels):
        explanation = f"was not measured on images of the gate; at least {floor:.1%} is asked"
        return Finding(rule, passed=False, explanation=explanation, remedy=candidate.again)
    found = share_of(outcome.standing(attack))
    assert found.estimate is not None
    explanation = f"{found.estimate:.1%} ({found.low:.1%} to {found.high:.1%}, {found.images} images of the gate)"
    return Finding(rule, found.estimate >= floor, f"{explanation}; at least {floor:.1%} is asked", _better(setting))


def _better(setting: str) -> str:
    return f"train a version that does better, or change rules.{setting}"


def _images(candidate: Evaluated) -> int:
    """Fewest images of the gate that an attack was run on."""
    return min((len(part.labels) for name, part in candidate.gate.items() if name in _COMPARED), default=0)


def _enough(candidate: Evaluated, rules: GateRules) -> Finding:
    images = _images(candidate)
    explanation = f"evaluated on {images} test images set aside for the gate; at least {rules.min_images} are asked"
    return Finding("images", images >= rules.min_images, explanation, _more_images(candidate, rules))


def _more_images(candidate: Evaluated, rules: GateRules) -> str:
    """How to get to as many images as are asked for."""
    data, there = candidate.report.data, candidate.gate_images
    if there < rules.min_images:
        return f"this test set has {there} images of the gate: lower rules.min_images"
    # A subset holds about its share of them; a quarter more leaves room for rounding by class.
    count = min(data.images, -(-5 * rules.min_images * data.images // (4 * there)))
    short = [
        name for name in _COMPARED if len(candidate.gate[name].labels) < rules.min_images if name in candidate.gate
    ]
    return candidate.again + "".join(f" --{_COUNTS[name]} {count}" for name in short)


def _audited(candidate: Evaluated, rules: GateRules) -> Finding:
    """Whether there is an audit that trusts the version, of attacks under the report's threat model."""
    if not rules.audit:
        return Finding("audit", passed=True, explanation="not asked for")
    report, again = candidate.report, candidate.again
    audit, threat = report.audit, report.threat_model
    if audit is None:
        return Finding("audit", passed=False, explanation="there was no audit for gradient masking", remedy=again)
    # Earlier versions let it rest on the PGD attack with the most steps, whatever its norm and radius.
    attacks = [attack for attack in report.attacks.values() if attack.kind == "pgd" and not attack.transfer]
    used = max(attacks, key=lambda attack: attack.num_steps, default=None)
    if report.gate is None and used is not None and (used.norm, used.epsilon) != (threat.norm, threat.epsilon):
        explanation = f"the audit for gradient masking attacked with {used.norm} {used.epsilon:g}, not with {threat}"
        return Finding("audit", passed=False, explanation=explanation, remedy=again)
    fewest = min(rules.min_images, ImageCounts().audit)
    if audit.images < fewest:
        explanation = f"the audit for gradient masking saw {audit.images} images; at least {fewest} are asked"
        return Finding("audit", passed=False, explanation=explanation, remedy=again)
    if not audit.trusted:
        explanation = f"the audit for gradient masking does not trust it: {audit.summary}"
        remedy = "read the audit in its report: it may be less robust than measured; train another version"
        return Finding("audit", passed=False, explanation=explanation, remedy=remedy)
    return Finding("audit", passed=True, explanation=f"trusted, by attacks on {audit.images} images: {audit.summary}")


def _detects(candidate: Evaluated, rules: GateRules) -> Finding:
    """Detection on the images of the gate; a report of an earlier version has it on all images only."""
    report, asked = candidate.report, f"at least {rules.min_detection_auc:g} is asked"
    measured = report.detection if report.gate is None else report.gate.detection
    # What a user of the version gets is the detector that it ships with.
    score = None if measured is None else measured.shipped or measured
    if measured is None or score is None or score.auc is None:
        why = f" ({score.reason})" if score is not None else ""
        explanation = f"AUC was not measured{why}; {asked}"
        return Finding("detection", passed=False, explanation=explanation, remedy=candidate.again)
    images = (measured.num_correct + measured.num_wrong) // 2  # natural and attacked
    if images < rules.min_images:
        explanation = f"AUC {score.auc:.3f} on {images} images; at least {rules.min_images} images are asked"
        return Finding("detection", passed=False, explanation=explanation, remedy=candidate.again)
    explanation = f"AUC {score.auc:.3f}, attacks of radius {measured.epsilon:g}; {asked}"
    return Finding("detection", score.auc >= rules.min_detection_auc, explanation, _better("min_detection_auc"))


def _same_images(first: ShardOutcome | None, second: ShardOutcome | None) -> bool:
    if first is None or second is None or not len(first.labels):
        return False
    return bool(first.indices.tolist() == second.indices.tolist() and first.labels.tolist() == second.labels.tolist())


def _not_worse(candidate: Evaluated, holder: Evaluated, attack: str, name: str, rules: GateRules) -> Finding:
    own, other = (each.gate[attack].standing(attack) for each in (candidate, holder))
    found = paired_difference(own, other)
    significant = found.difference < 0 and found.p_value < rules.significance
    dropped = -found.difference > rules.max_drop
    passed = not (significant or dropped)
    explanation = (
        f"{100 * found.difference:+.2f} points ({100 * found.low:+.2f} to {100 * found.high:+.2f}), right on "
        f"{(own & ~other).sum()} images that the other misses, wrong on {(~own & other).sum()} that it gets; "
        f"p = {found.p_value:.2g} against {name}"
    )
    return Finding(f"{attack} not worse", passed, explanation, _better("max_drop"))


def _percent(found: Accuracy) -> str:
    estimate = "nothing" if found.estimate is None else f"{found.estimate:.2%}"
    return f"{estimate} of {found.images}"
