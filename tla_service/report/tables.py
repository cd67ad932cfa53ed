"""From findings to the report's tables."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tla_service.attacks import Attack
from tla_service.attacks.autoattack import ALL_STAGES
from tla_service.config.radii import ImageShape, customary_radius
from tla_service.evaluation import results as rs
from tla_service.evaluation.beyond import NormRow
from tla_service.evaluation.geometry import neighbour_accuracy
from tla_service.evaluation.shards import ShardOutcome, standing_under_all
from tla_service.report.findings import Findings
from tla_service.report.plan import Plan, other_norm_attack, radius_name
from tla_service.report.schema import AttackFacts, AutoAttackFacts

# Below this, AutoAttack's lead is what a fair attack of fewer steps leaves; above, the others are weak.
WEAK_GAP = 0.02
# AutoAttack's own bound: what Square adds to gradient attacks says that these are unreliable.
_SQUARE_GAIN = 0.002


def accuracies(found: Findings, plan: Plan, num_classes: int) -> dict[str, rs.Accuracy]:
    """Accuracy by attack: clean, the table's attacks, the worst of them, AutoAttack."""
    outcome = found.outcome
    standing = {name: outcome.standing(name) for name in ("clean", *plan.columns, *plan.transfer)}
    standing["worst"] = standing_under_all(outcome, found.transfer)
    table = {name: rs.class_accuracy(correct, outcome.labels, num_classes) for name, correct in standing.items()}
    strong = found.autoattack
    if strong is not None:
        table["autoattack"] = rs.class_accuracy(strong.standing("autoattack"), strong.labels, num_classes)
    return table


def norm_table(found: Findings, plan: Plan, data_name: str, shape: ImageShape) -> tuple[NormRow, ...]:
    """Accuracy in each norm, at the threat model's radius in its own and the customary one in the others."""
    radius, source = customary_radius(data_name, plan.norm, shape)
    own = source if radius == plan.epsilon else "threat model of this report"

    def row(attack: Attack, outcome: ShardOutcome, name: str, source: str) -> NormRow:
        attack = _as_run(attack)
        steps = f"{attack.num_steps} step{'s' if attack.num_steps > 1 else ''}"
        starts = f"{attack.num_restarts} start{'s' if attack.num_restarts > 1 else ''}"
        shares = rs.share_of(outcome.standing(name)), rs.share_of(outcome.standing("clean"))
        return NormRow(attack.norm, attack.epsilon, source, f"{attack.kind.upper()}, {steps}, {starts}", *shares)

    if found.other_norm is None:
        return ()
    strongest = min(plan.within, key=lambda name: int(found.outcome.standing(name).sum()))
    rows = [row(plan.columns[strongest], found.outcome, strongest, own)]
    if found.autoattack is not None:
        standing = (found.autoattack.standing(name) for name in ("autoattack", "clean"))
        rows.append(NormRow(plan.norm, plan.epsilon, own, "AutoAttack", *map(rs.share_of, standing)))
    attack = other_norm_attack(plan, data_name, shape)
    rows.append(row(attack, found.other_norm, "pgd", customary_radius(data_name, attack.norm, shape)[1]))
    for norm, sizes in reversed(found.sizes.items()):
        radius, source = customary_radius(data_name, norm, shape)
        shares = rs.share_of(sizes > radius), rs.share_of(sizes > 0)
        rows.append(NormRow(norm, radius, source, "FMN, smallest perturbation found", *shares))
    return tuple(rows)


def _as_run(attack: Attack) -> Attack:
    """The attack with the steps and starts that it makes, whatever is set."""
    if attack.kind == "fgsm":
        attack = replace(attack, num_steps=1, step_size=attack.epsilon)
    return attack if attack.starts_at_random else replace(attack, num_restarts=1)


def attack_facts(plan: Plan) -> dict[str, AttackFacts]:
    """How the table's attacks were run."""
    shown = set(AttackFacts.model_fields)
    return {
        name: AttackFacts(**{key: value for key, value in vars(attack).items() if key in shown}, transfer=transfer)
        for attacks, transfer in ((plan.columns, False), (plan.transfer, True))
        for name, attack in zip(attacks, map(_as_run, attacks.values()), strict=True)
    }


def autoattack_facts(found: Findings, plan: Plan) -> AutoAttackFacts | None:
    """What AutoAttack says, and whether the other attacks come near it."""
    strong = found.autoattack
    if strong is None:
        return None
    same = np.isin(found.outcome.indices, strong.indices)
    shared = np.isin(strong.indices, found.outcome.indices)
    standing = {name: found.outcome.standing(name)[same] for name in plan.within}
    strongest = min(standing, key=lambda name: int(standing[name].sum()))
    gap = rs.paired_difference(standing[strongest], strong.standing("autoattack")[shared])
    broken_at, run = strong.broken_at["autoattack"], strong.autoattack
    assert run is not None
    return AutoAttackFacts(
        version=run.version,
        stages=run.stages,
        left_out=strong.left_out,
        broken_by={stage: int((broken_at == 1 + ALL_STAGES.index(stage)).sum()) for stage in run.stages},
        strongest=strongest,
        gap=gap,
        weak=gap.low > 0 and gap.difference > WEAK_GAP,
        warnings=autoattack_warnings(strong),
    )


def autoattack_warnings(strong: ShardOutcome | None) -> tuple[str, ...]:
    """AutoAttack's warnings about a network; Square's share is judged here, over all images."""
    if strong is None:
        return ()
    broken_at = strong.broken_at["autoattack"]
    gained = int((broken_at == 1 + ALL_STAGES.index("square")).sum())
    if gained <= _SQUARE_GAIN * len(broken_at):
        return strong.warnings
    return (*strong.warnings, f"Square, which sees no gradients, breaks {gained} of {len(broken_at)} images that stood "
            "until then: gradient attacks may be unreliable on this network")  # fmt: skip


def relatives(found: Findings, tried: Sequence[rs.Relative]) -> tuple[rs.Relative, ...]:
    """The relatives with the accuracy on examples crafted on them, where they were attacked."""
    transfer = found.transfer
    return tuple(
        replace(each, accuracy=rs.share_of(transfer.standing(each.source)))
        if transfer is not None and each.source in transfer.broken_at
        else each
        for each in tried
    )


def differences(found: Findings, other: Findings, plan: Plan) -> dict[str, rs.Difference]:
    """This model's accuracy minus another's, attack by attack, on the same images."""
    pairs: dict[str, tuple[rs.BoolArray, rs.BoolArray]] = {
        name: (found.outcome.standing(name), other.outcome.standing(name))
        for name in ("clean", *plan.columns, *plan.transfer)
    }
    if found.autoattack is not None and other.autoattack is not None:
        pairs["autoattack"] = found.autoattack.standing("autoattack"), other.autoattack.standing("autoattack")
    return {name: rs.paired_difference(*pair) for name, pair in pairs.items()}


def neighbours(found: Findings, plan: Plan) -> rs.Neighbours | None:
    """Accuracy of a vote of the nearest training images."""
    if not found.embedded:
        return None
    bank, chosen = found.embedded["bank"].embedded, plan.settings.neighbours
    k = min(chosen.k, len(bank))
    clean, attacked = (
        neighbour_accuracy(found.embedded[name].embedded, bank, k=k, metric=chosen.metric)
        for name in ("natural", radius_name(plan.epsilon))
    )
    return rs.Neighbours(k, len(bank), clean, attacked)
