"""What the gate reads: the evaluation under the threat model that it asks for, and the gate images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from pydantic import ValidationError

from tests.registry.evaluations import (
    IMAGES,
    STANDARD,
    TRAINED_FOR,
    adaptive,
    evaluate,
    fates,
    register_another,
    report_on,
)
from tests.registry.test_promotion import aliases, attempt, failed
from tests.registry.tracking_server import Packaged, config_for
from tla_service.attacks import UNBROKEN
from tla_service.data.splits import gate_images, stratified_subset
from tla_service.evaluation.shards import AutoAttackRun, ShardOutcome
from tla_service.registry.gate import Evaluated, Finding, compare, judge
from tla_service.registry.job_settings import GateRules
from tla_service.report.schema import ThreatModel, artifact_folder

RULES = GateRules(min_clean_accuracy=0.9, min_autoattack_accuracy=0.5, min_detection_auc=0.7)
PERFECT, GOOD, POOR = fates(IMAGES, IMAGES), fates(390, 300), fates(390, 40)
TINY = ThreatModel(norm="l2", epsilon=1e-6)
L2 = ThreatModel(norm="l2", epsilon=128 / 255)


def asking_for(threat: ThreatModel) -> GateRules:
    return GateRules.model_validate(RULES.model_dump() | {"norm": threat.norm, "epsilon": threat.epsilon})


def evaluated(outcome: ShardOutcome, run: AutoAttackRun | None = None, **changes: Any) -> Evaluated:
    """A version with this evaluation, as the registry would give it."""
    marked = replace(outcome, autoattack=run or AutoAttackRun("standard", "linf", 0.15, STANDARD))
    report = report_on("0" * 64, outcome, **changes)
    return Evaluated(
        "1", report, dict.fromkeys(outcome.broken_at, marked), "f00d", STANDARD, "run jobs/evaluate_tla.py AGAIN"
    )


def refusals(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.rule: finding for finding in findings if not finding.passed}


def sha256(packaged: Packaged, version: str) -> str:
    return str(MlflowClient(packaged.uri).get_model_version("tla-digits", version).tags["weights_sha256"])


@pytest.mark.parametrize(
    ("threat", "slug", "words"),
    [
        (ThreatModel(norm="linf", epsilon=8 / 255), "linf-8_255", "linf 8/255"),
        (ThreatModel(norm="linf", epsilon=0.031372549), "linf-8_255", "linf 8/255"),
        (ThreatModel(norm="linf", epsilon=0.2), "linf-0.2", "linf 0.2"),
        (ThreatModel(norm="linf", epsilon=0.031), "linf-0.031", "linf 0.031"),
        (L2, "l2-128_255", "l2 128/255"),
        (TINY, "l2-1e-06", "l2 1e-06"),
        (ThreatModel(norm="l2", epsilon=2), "l2-2", "l2 2"),
    ],
)
def test_threat_models_have_names(threat: ThreatModel, slug: str, words: str) -> None:
    assert (threat.slug, str(threat)) == (slug, words)


def test_an_evaluation_under_another_threat_model_promotes_nobody(packaged: Packaged) -> None:
    evaluate(packaged, "1", PERFECT, threat=TINY)
    evaluate(packaged, "1", PERFECT, threat=ThreatModel(norm="linf", epsilon=0.01))
    found = failed(attempt(packaged, "1"))
    assert set(found) == {"version evaluated"}
    assert "was evaluated under l2 1e-06, linf 0.01 only" in found["version evaluated"]
    assert "there is no evaluation of these weights under linf 0.15" in found["version evaluated"]
    assert found["version evaluated"].endswith("run jobs/evaluate_tla.py --model models:/tla-digits/1")


def test_a_later_evaluation_under_another_threat_model_changes_nothing(packaged: Packaged) -> None:
    evaluate(packaged, "1", POOR)
    evaluate(packaged, "1", PERFECT, threat=TINY)
    assert set(failed(attempt(packaged, "1", RULES))) == {"AutoAttack accuracy"}
    evaluate(packaged, "1", GOOD)
    evaluate(packaged, "1", POOR, threat=L2)
    assert attempt(packaged, "1", RULES).verdict == "promoted"


def test_the_rules_name_the_threat_model(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    found = failed(attempt(packaged, "1", asking_for(L2)))
    command = "run jobs/evaluate_tla.py --model models:/tla-digits/1 --norm l2 --epsilon 128/255"
    assert found["version evaluated"].endswith(command)
    evaluate(packaged, "1", POOR, threat=L2)
    assert set(failed(attempt(packaged, "1", asking_for(L2)))) == {"AutoAttack accuracy"}
    evaluate(packaged, "1", GOOD, threat=L2)
    decision = attempt(packaged, "1", asking_for(L2))
    assert decision.verdict == "promoted"
    assert "under l2 128/255 (trained for linf 0.15)" in decision.findings[1].explanation


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"norm": "l2"}, "give rules.epsilon"),
        ({"epsilon": 0.1}, "give rules.norm"),
        ({"norm": "linf", "epsilon": 8}, "8/255"),
    ],
)
def test_half_a_threat_model_is_refused(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GateRules.model_validate(rules)


def test_an_edited_tag_does_not_change_what_is_asked_for(packaged: Packaged) -> None:
    made = MlflowClient(packaged.uri)
    for name, value in {"norm": "l2", "epsilon": "1e-06", "tla.accuracy.autoattack": "1"}.items():
        made.set_model_version_tag("tla-digits", "1", name, value)
    evaluate(packaged, "1", PERFECT, threat=TINY)
    assert set(failed(attempt(packaged, "1"))) == {"version evaluated"}


def test_a_report_in_another_ones_place_is_refused(packaged: Packaged) -> None:
    evaluate(packaged, "1", PERFECT, threat=TINY, folder=artifact_folder(sha256(packaged, "1"), TRAINED_FOR))
    found = failed(attempt(packaged, "1"))
    assert "another threat model (l2 1e-06, not linf 0.15)" in found["version evaluated"]
    # And with another threat model written into it: the images' results say how they were attacked.
    evaluate(packaged, "1", PERFECT, run=AutoAttackRun("standard", TINY.norm, TINY.epsilon, STANDARD))
    found = failed(attempt(packaged, "1"))
    assert found["AutoAttack"] == "it was run with l2 1e-06, but the report is about linf 0.15"


FEW = {"estimate": 0.0, "low": 0.0, "high": 0.8, "images": 1}
WEAKER: dict[str, tuple[dict[str, Any], str, str]] = {
    "another version": ({"run": AutoAttackRun("rand", "linf", 0.15, STANDARD)}, "AutoAttack", "rand, not standard"),
    "a part left out": (
        {"run": AutoAttackRun("standard", "linf", 0.15, STANDARD[:3])}, "AutoAttack", "square was not run",
    ),
    "audit on few images": ({"audit": {"trusted": True, "images": 7, "checks": []}}, "audit", "used 7 images"),
    "failed audit on few images": (
        {"audit": {"trusted": False, "images": 7, "checks": []}}, "audit", "7 images; at least 100 required; it failed",
    ),
    "attacks not tested": ({"unit_tests": None}, "audit", "audit were run on too few images: images.unit_tests 0"),
    "few attacks tested": (
        {"unit_tests": {"images": 9, "random": FEW, "attacks": [], "bar": 0.8}}, "audit", "images.unit_tests 9",
    ),
    "one image of relatives": (
        {"relatives": [{"source": "natural", "about": "x", "accuracy": FEW}]}, "audit", "images.transfer 1",
    ),
    "no relatives": ({"relatives": ()}, "audit", "too few images: images.transfer 0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "rule", "words"), WEAKER.values(), ids=WEAKER.keys())
def test_a_weaker_protocol_is_refused(changes: dict[str, Any], rule: str, words: str) -> None:
    found = refusals(judge(evaluated(GOOD, **changes), RULES))
    assert set(found) == {rule}
    assert words in found[rule].explanation
    assert found[rule].remedy == "run jobs/evaluate_tla.py AGAIN"


def test_detection_on_few_images_is_refused() -> None:
    gate = report_on("0" * 64, GOOD).model_dump()["gate"]
    gate["detection"]["adaptive"]["images"] = 20
    found = refusals(judge(evaluated(GOOD, gate=gate), RULES))
    assert "on 20 images; at least 100 images required" in found["detection"].explanation
    assert found["detection"].remedy == "run jobs/evaluate_tla.py AGAIN --images.adaptive 400"


def test_the_holder_is_compared_under_the_same_threat_model(packaged: Packaged) -> None:
    """Better at one threat model and worse at another: which one is asked for decides."""
    evaluate(packaged, "1", fates(390, 320))
    second = register_another(packaged)
    evaluate(packaged, second, fates(390, 280))
    evaluate(packaged, second, fates(390, 360), threat=L2)
    assert attempt(packaged, "1").verdict == "promoted"
    assert set(failed(attempt(packaged, second))) == {"autoattack not worse"}
    found = failed(attempt(packaged, second, asking_for(L2)))
    assert set(found) == {"champion evaluated"}
    assert found["champion evaluated"].endswith(
        "run jobs/evaluate_tla.py --model models:/tla-digits/1 --norm l2 --epsilon 128/255"
    )
    evaluate(packaged, "1", fates(390, 320), threat=L2)
    assert attempt(packaged, second, asking_for(L2)).verdict == "promoted"


def test_training_for_less_does_not_make_a_champion(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    assert attempt(packaged, "1").verdict == "promoted"
    less = ThreatModel(norm="linf", epsilon=0.001)
    config = config_for(packaged.uri, attack={"epsilon": 0.001, "step_size": 0.001})
    second = register_another(packaged, config=config)
    for version in ("1", second):
        evaluate(packaged, version, PERFECT, threat=less)
    decision = attempt(packaged, second)
    assert "trained for linf 0.001, but version 1 (champion) for linf 0.15" in failed(decision)["comparable"]
    remedy = "give the same command with --rules.norm linf --rules.epsilon 0.15"
    assert decision.findings[-1].remedy == remedy
    evaluate(packaged, second, POOR)
    assert "AutoAttack accuracy" in failed(attempt(packaged, second, asking_for(TRAINED_FOR)))
    assert aliases(packaged) == {"champion": "1"}


def with_right(gate: bool, rest: bool) -> ShardOutcome:
    """All gate images right, or all others."""
    assert GOOD.gate is not None
    right = np.where(GOOD.gate, UNBROKEN if gate else 0, UNBROKEN if rest else 0)
    return replace(GOOD, broken_at={"clean": right, "autoattack": right})


def test_only_images_set_aside_decide() -> None:
    champion, loser = evaluated(with_right(gate=True, rest=False)), evaluated(with_right(gate=False, rest=True))
    assert not refusals(judge(champion, RULES))
    found = refusals(judge(loser, RULES))
    assert set(found) == {"clean accuracy", "AutoAttack accuracy"}
    assert found["clean accuracy"].explanation.startswith("0.0% (")
    assert "100 gate images" in found["clean accuracy"].explanation
    assert not refusals(compare(champion, loser, "champion", RULES))
    found = refusals(compare(loser, champion, "champion", RULES))
    assert "-100.00 points" in found["clean not worse"].explanation


def test_detection_is_judged_on_images_set_aside() -> None:
    gate = report_on("0" * 64, GOOD).model_dump()["gate"]
    gate["detection"]["adaptive"]["auc"] = 0.6
    found = refusals(judge(evaluated(GOOD, gate=gate), RULES))["detection"]
    assert found.explanation == "AUC 0.600 under an adaptive attack of radius 0.15; at least 0.7 required"


def test_detection_is_that_of_the_detector_that_users_get() -> None:
    """An attack that defeats the shipped detector counts, whatever the other one and unaware attacks say."""
    gate = report_on("0" * 64, GOOD).model_dump()["gate"]
    shipped = {key: gate["detection"][key] for key in ("auc", "low", "high")} | {"threshold": 1.0}
    shipped |= dict.fromkeys(("false_rejections", "detected"), gate["detection"]["adaptive"]["rejected"])
    gate["detection"]["shipped"] = shipped | {"adaptive": adaptive(0.2, 100)}
    assert (
        "AUC 0.200 under an adaptive attack"
        in refusals(judge(evaluated(GOOD, gate=gate), RULES))["detection"].explanation
    )


def test_an_evaluation_of_before_the_attack_on_the_detector_is_made_again() -> None:
    gate = report_on("0" * 64, GOOD).model_dump()["gate"]
    del gate["detection"]["adaptive"]
    found = refusals(judge(evaluated(GOOD, gate=gate), RULES))
    assert set(found) == {"detection"}
    assert found["detection"].explanation.startswith("the evaluation did not attack the detector")
    assert found["detection"].remedy == "run jobs/evaluate_tla.py AGAIN --images.adaptive 400"
    assert not refusals(judge(evaluated(GOOD, gate=gate), RULES.model_copy(update={"min_detection_auc": 0.0})))


@pytest.mark.parametrize(
    ("images", "fewest", "remedy"),
    [(80, 100, "this test set has 20 gate images"), (400, 101, "this test set has 100 gate images")],
)
def test_a_test_set_with_few_images_says_so(images: int, fewest: int, remedy: str) -> None:
    rules = RULES.model_copy(update={"min_images": fewest})
    found = refusals(judge(evaluated(fates(images, images, images=images)), rules))
    assert found["images"].remedy.startswith(remedy)


def test_too_few_images_of_many_are_mended_by_a_command() -> None:
    outcome = fates(80, 80, images=80)
    gate = report_on("0" * 64, outcome).model_dump()["gate"] | {"images": 1000}
    for classes, count in ((10, 500), (700, 2800)):
        data = {"name": "x", "images": 4000, "fingerprint": "f00d", "class_names": list(map(str, range(classes)))}
        found = refusals(judge(evaluated(outcome, data=data, gate=gate), RULES))
        assert found["images"].remedy.endswith(f"AGAIN --images.attacks {count} --images.autoattack {count}")


def test_the_remedys_images_of_many_classes_hold_gate_images() -> None:
    labels = torch.arange(700).repeat(6)
    gate = gate_images(labels)
    assert not gate[stratified_subset(labels, 500)].any()
    assert gate[stratified_subset(labels, 2800)].sum() >= RULES.min_images


def test_a_damaged_evaluation_is_made_again(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    root = MlflowClient(packaged.uri).get_run(packaged.run_id).info.artifact_uri.removeprefix("file://")
    folder = Path(root, artifact_folder(sha256(packaged, "1"), TRAINED_FOR))
    report, outcome = ((folder / name).read_bytes() for name in ("report.json", "outcome.npz"))
    garbled = outcome[:60] + b"\xff" * 60 + outcome[120:]
    for name, content, damaged in (
        ("report.json", report, report[:40]), ("outcome.npz", outcome, garbled), ("outcome.npz", outcome, None)
    ):  # fmt: skip
        (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
        found = failed(attempt(packaged, "1"))["version evaluated"]
        assert "run jobs/evaluate_tla.py --model models:/tla-digits/1 --output" in found
        (folder / name).write_bytes(content)
    assert attempt(packaged, "1").verdict == "promoted"


def test_other_training_data_than_that_of_the_evaluation_is_told() -> None:
    told = {}
    for trained_on in ("f00d", "beef", None):
        (told[trained_on],) = [
            finding for finding in judge(replace(evaluated(GOOD), trained_on=trained_on), RULES)
            if finding.rule == "training data"
        ]  # fmt: skip
    assert all(finding.passed for finding in told.values())
    assert told["beef"].explanation.startswith("beef, but evaluated on f00d: make sure")
    assert told["f00d"].explanation == told[None].explanation == "that of the evaluation, f00d"
