"""Whether to trust the figures: the audit's checks, and what AutoAttack says of the network."""

from collections.abc import Mapping
from typing import Any

from tla_service.attacks.autoattack import ALL_STAGES, ZERO_GRADIENT
from tla_service.evaluation.outcomes import ShardOutcome
from tla_service.evaluation.surrogate import TrainedSurrogate
from tla_service.report.audit_schema import AuditFacts, CheckFacts, SurrogateFacts

# AutoAttack's own bound: what Square adds to gradient attacks says that these are unreliable.
_SQUARE_GAIN = 0.002


def autoattack_warnings(strong: ShardOutcome | None) -> tuple[str, ...]:
    """What AutoAttack says of a network; Square's share is judged here, over all images."""
    if strong is None:
        return ()
    fates = strong.broken_at["autoattack"]
    gained = int((fates == 1 + ALL_STAGES.index("square")).sum())
    if gained <= _SQUARE_GAIN * len(fates):
        return strong.warnings
    return (*strong.warnings, f"Square, which sees no gradients, breaks {gained} of {len(fates)} images that stood "
            "until then: gradient attacks may be unreliable on this network")  # fmt: skip


def audit_facts(
    audit: Mapping[str, Any] | None, strong: ShardOutcome | None, own: TrainedSurrogate | None
) -> AuditFacts | None:
    """The audit for the report, with what AutoAttack objects to as one more check.

    Args:
        audit: As :meth:`Audit.as_dict`; None where there was none.
        strong: AutoAttack's outcome.
        own: The surrogate that was trained for the audit.
    """
    if audit is None:
        return None
    checks = [*audit["checks"], _objections(strong)]
    return AuditFacts(
        trusted=all(check["outcome"] != "failed" for check in checks),
        images=audit["images"],
        checks=tuple(CheckFacts.model_validate(check) for check in checks),
        surrogate=None if own is None else SurrogateFacts(**own.facts),
    )


def _objections(strong: ShardOutcome | None) -> dict[str, Any]:
    """AutoAttack should find nothing that makes its figure unreliable. Zero gradients have a check of their own."""
    warnings = strong.warnings if strong is not None else ()
    objections = [warning for warning in warnings if warning != ZERO_GRADIENT]
    return {
        "name": "autoattack_raises_no_objection",
        "figure": None if strong is None else float(len(objections)),
        "threshold": 0.0,
        "outcome": "not run" if strong is None else "failed" if objections else "passed",
        "statement": "AutoAttack was not run"
        if strong is None
        else "; ".join(warnings) or "AutoAttack gave no warning",
        "meaning": "AutoAttack considers its own figure unreliable for this network",
    }
