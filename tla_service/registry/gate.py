"""The gate of promotion: what a version must show, rule by rule, before it may carry an alias."""

from collections.abc import Mapping
from dataclasses import dataclass

from tla_service.errors import UserError
from tla_service.evaluation.intervals import PairedDifference, paired_difference
from tla_service.evaluation.outcomes import ShardOutcome
from tla_service.registry.gate_rules import GateRules
from tla_service.report.schema import Accuracy, Report

_COMPARED = ("clean", "autoattack")


@dataclass(frozen=True)
class Finding:
    """A rule and what came of it.

    Attributes:
        rule: Its name.
        passed: Whether the version satisfies it.
        explanation: What was found, and what was wanted.
    """

    rule: str
    passed: bool
    explanation: str

    def __str__(self) -> str:
        return f"{'passed ' if self.passed else 'REFUSED'} {self.rule:<20} {self.explanation}"


@dataclass(frozen=True)
class Evaluated:
    """A version whose files are intact, with the evaluation of these files.

    Attributes:
        version: Its number.
        report: The report.
        outcomes: Each image's fate, by attack.
    """

    version: str
    report: Report
    outcomes: Mapping[str, ShardOutcome]


def judge(candidate: Evaluated, rules: GateRules) -> list[Finding]:
    """Hold a version against the rules that concern it alone."""
    report = candidate.report
    trusted = report.audit is not None and report.audit.trusted
    measured = report.detection
    # What a user of the version gets is the detector that it ships with.
    auc = None if measured is None else measured.auc if measured.shipped is None else measured.shipped.auc
    return [
        *_figures(candidate),
        _at_least("clean accuracy", report.accuracy.get("clean"), rules.min_clean_accuracy),
        _at_least("AutoAttack accuracy", report.accuracy.get("autoattack"), rules.min_autoattack_accuracy),
        _enough(report, rules),
        Finding("audit", trusted or not rules.audit, _audited(report)),
        Finding(
            "detection",
            auc is not None and auc >= rules.min_detection_auc,
            f"AUC {'was not measured' if auc is None else f'{auc:.3f}'}; at least {rules.min_detection_auc:g} is asked",
        ),
    ]


def compare(candidate: Evaluated, holder: Evaluated, alias: str, rules: GateRules) -> list[Finding]:
    """Hold a version against the one that carries the alias, on the same images."""
    mine, other = candidate.report, holder.report
    name = f"version {holder.version} ({alias})"
    same = [
        ("data", mine.data.fingerprint, other.data.fingerprint),
        ("norm", mine.threat_model.norm, other.threat_model.norm),
        ("epsilon", mine.threat_model.epsilon, other.threat_model.epsilon),
    ]
    different = [f"{what} {here} against {there}" for what, here, there in same if here != there]
    different += [
        f"other {attack} images"
        for attack in _COMPARED
        if not _same_images(candidate.outcomes.get(attack), holder.outcomes.get(attack))
    ]
    explanation = ", ".join(different) or "the same images, labels and threat model"
    comparable = Finding("comparable", not different, f"evaluated as {name}: {explanation}")
    if different:
        return [comparable]
    return [comparable, *(_not_worse(candidate, holder, attack, name, rules) for attack in _COMPARED)]


def refused(rule: str, error: UserError) -> Finding:
    """A rule that a version fails because something cannot be used."""
    return Finding(rule, passed=False, explanation=f"{error.reason}; {error.remedy}")


def _figures(candidate: Evaluated) -> list[Finding]:
    """Whether the report's figures follow from the images' fates: a report is a text that anyone can edit."""
    wrong = []
    for attack in _COMPARED:
        stated, outcome = candidate.report.accuracy.get(attack), candidate.outcomes.get(attack)
        if stated is None or outcome is None:
            wrong.append(f"{attack} was not run")
            continue
        standing = outcome.standing(attack)
        right = int(standing.sum())
        if stated.images != len(standing) or stated.estimate is None or round(stated.estimate * len(standing)) != right:
            wrong.append(f"{attack}: the report says {_percent(stated)}, the images' fates {right} of {len(standing)}")
    return [Finding("figures", not wrong, "; ".join(wrong) or "follow from the fates of the images")]


def _at_least(rule: str, found: Accuracy | None, floor: float) -> Finding:
    if found is None or found.estimate is None:
        return Finding(rule, passed=False, explanation=f"was not measured; at least {floor:.1%} is asked")
    explanation = (
        f"{found.estimate:.1%} ({found.low:.1%} to {found.high:.1%}, {found.images} images); at least {floor:.1%}"
    )
    return Finding(rule, found.estimate >= floor, f"{explanation} is asked")


def _enough(report: Report, rules: GateRules) -> Finding:
    images = min((report.accuracy[name].images for name in _COMPARED if name in report.accuracy), default=0)
    explanation = f"evaluated on {images} test images; at least {rules.min_images} are asked"
    return Finding("images", images >= rules.min_images, explanation)


def _audited(report: Report) -> str:
    if report.audit is None:
        return "there was no audit for gradient masking"
    if not report.audit.trusted:
        return f"the audit for gradient masking does not trust it: {report.audit.summary}"
    return f"gradient masking: {report.audit.summary}"


def _same_images(first: ShardOutcome | None, second: ShardOutcome | None) -> bool:
    if first is None or second is None:
        return False
    return bool(first.indices.tolist() == second.indices.tolist() and first.labels.tolist() == second.labels.tolist())


def _not_worse(candidate: Evaluated, holder: Evaluated, attack: str, name: str, rules: GateRules) -> Finding:
    found = paired_difference(candidate.outcomes[attack].standing(attack), holder.outcomes[attack].standing(attack))
    significant = found.difference < 0 and found.p_value < rules.significance
    dropped = -found.difference > rules.max_drop
    return Finding(f"{attack} not worse", not (significant or dropped), f"{_difference(found)} against {name}")


def _difference(found: PairedDifference) -> str:
    return (
        f"{100 * found.difference:+.2f} points ({100 * found.low:+.2f} to {100 * found.high:+.2f}), right on "
        f"{found.first_only} images that the other misses, wrong on {found.second_only} that it gets; "
        f"p = {found.p_value:.2g}"
    )


def _percent(found: Accuracy) -> str:
    estimate = "nothing" if found.estimate is None else f"{found.estimate:.2%}"
    return f"{estimate} of {found.images}"
