"""Files beside a report: the JSON Schema, results of single images, AutoAttack's images, the audit as SARIF."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jsonschema import Draft4Validator, Draft202012Validator, ValidationError

from tests.registry.evaluations import fates, report_on
from tests.report.subjects import digits, trained
from tla_service.attacks import UNBROKEN, Attack
from tla_service.attacks.autoattack import run_autoattack
from tla_service.evaluation import suite
from tla_service.evaluation.results import Audit, Check
from tla_service.evaluation.shards import AutoAttackRun, Shard, ShardOutcome, load_arrays
from tla_service.evaluation.suite import AttackMeasurement
from tla_service.report import schema as rp
from tla_service.report.evidence import write_adversarial, write_images, write_sarif
from tla_service.report.page import write_page

THREAT = rp.ThreatModel(norm="linf", epsilon=0.1)
SARIF = Path(__file__).with_name("sarif-2.1.0.schema.json")
SCHEMA = json.loads(rp.SCHEMA_FILE.read_text())


def test_the_schema_is_the_generated_one() -> None:
    assert rp.SCHEMA_FILE.read_text() == rp.json_schema(), "run: python -m tla_service.report.schema"
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == f"urn:tla-service:report:{rp.FORMAT}"


def test_reports_of_earlier_versions_fit_the_schema() -> None:
    """Without any of the fields that are optional; what was added since the first version of the format is."""
    report = report_on("a" * 64, fates(90, 70, images=100))
    content = json.loads(report.model_dump_json(exclude_defaults=True))
    Draft202012Validator(SCHEMA).validate(content)
    with pytest.raises(ValidationError, match="'seed' is a required property"):
        Draft202012Validator(SCHEMA).validate({name: value for name, value in content.items() if name != "seed"})
    assert set(SCHEMA["required"]) == {
        "model", "data", "threat_model", "accuracy", "attacks", "seed", "settings", "seconds", "hardware", "gate",
    }  # fmt: skip


def strong() -> ShardOutcome:
    """Four images: right, misclassified, broken by the first stage and by the last; the first is a gate image."""
    clean = np.full((4, 1, 2, 2), 0.5, np.float32)
    adversarial = clean.copy()
    adversarial[2:, 0, 0, 0] = np.float32(0.4)  # 0.4000000059: inside
    per_image = {
        "predicted": np.array([0, 0, 2, 0]),
        "attacked": np.array([0, 0, 1, 1]),
        "clean": clean,
        "adversarial": adversarial,
    }
    broken_at = {"clean": np.array([UNBROKEN, 0, UNBROKEN, UNBROKEN]), "autoattack": np.array([UNBROKEN, 0, 1, 6])}
    gate = np.array([True, False, False, False])
    run = AutoAttackRun("standard", "linf", 0.1, ("apgd-ce", "square"))
    indices = np.array([2, 3, 5, 8])
    return ShardOutcome(indices, np.array([0, 1, 2, 0]), broken_at, autoattack=run, gate=gate, per_image=per_image)


def test_the_table_says_of_each_image_what_was_measured(tmp_path: Path) -> None:
    table = ShardOutcome(
        np.array([1, 2, 3]),
        np.array([1, 0, 1]),
        {"clean": np.array([0, UNBROKEN, 0]), "pgd": np.array([0, 2, 0]), "fgsm": np.array([0, UNBROKEN, 0])},
        gate=np.array([False, True, False]),
        per_image={"predicted": np.array([2, 0, 0])},
    )
    write_images(table, strong(), ("cat", "dog", "owl"), tmp_path / "images.parquet")
    columns = pq.read_table(tmp_path / "images.parquet").to_pydict()
    assert columns == {
        "index": [1, 2, 3, 5, 8],
        "label": [1, 0, 1, 2, 0],
        "label_name": ["dog", "cat", "dog", "owl", "cat"],
        "gate": [False, True, False, False, False],
        "predicted": [2, 0, 0, 2, 0],
        "correct/clean": [False, True, False, None, None],
        "correct/pgd": [False, False, False, None, None],
        "broken_at/pgd": [0, 2, 0, None, None],
        "correct/fgsm": [False, True, False, None, None],
        "broken_at/fgsm": [0, None, 0, None, None],
        "correct/autoattack": [None, True, False, False, False],
        "broken_at/autoattack": [None, None, "clean", "apgd-ce", "square"],
        "correct/worst": [False, False, False, None, None],
    }


@pytest.fixture(scope="module")
def attacked() -> ShardOutcome:
    """Test images of a trained network under an attack and AutoAttack's first stage, some of them gate images."""
    data, rows = digits(), np.arange(24)
    images, labels = data.test.fetch(torch.from_numpy(rows)), data.test.labels[:24]
    pgd = Attack(kind="pgd", epsilon=THREAT.epsilon, step_size=0.05, num_steps=3, num_restarts=2)
    measure = AttackMeasurement({"pgd": pgd}, {}, ("linf", THREAT.epsilon), seed=0, batch_size=12, keep_images=True)
    shard = Shard(trained(), None, images, labels, rows, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "run_autoattack", partial(run_autoattack, only=["apgd-ce"]))
        return replace(measure.merge([measure.run(shard)]), gate=rows % 4 == 0)


def test_the_table_has_the_accuracies_of_the_report(attacked: ShardOutcome, tmp_path: Path) -> None:
    write_images(attacked, None, list("0123456789"), tmp_path / "images.parquet")
    columns = pq.read_table(tmp_path / "images.parquet")
    for name in ("clean", "pgd", "autoattack"):
        assert columns[f"correct/{name}"].to_pylist() == attacked.standing(name).tolist()
    worst = attacked.standing("clean") & attacked.standing("pgd") & attacked.standing("autoattack")
    assert columns["correct/worst"].to_pylist() == worst.tolist()


def test_real_images_of_autoattack_prove_its_accuracy(attacked: ShardOutcome, tmp_path: Path) -> None:
    facts = write_adversarial(attacked, tmp_path)
    assert facts.file == "adversarial.npz", facts.reason
    arrays = load_arrays(tmp_path / "adversarial.npz")
    assert {name: (values.dtype, values.shape) for name, values in arrays.items()} == {
        "x_adv": (np.float32, (24, 1, 8, 8)),
        "x_test": (np.float32, (24, 1, 8, 8)),
        "y_test": (np.int64, (24,)),
        "index": (np.int64, (24,)),
        "gate": (np.bool_, (24,)),
    }
    distance = np.abs(arrays["x_adv"].astype(float) - arrays["x_test"]).max((1, 2, 3))
    assert 0.099 < distance.max() <= 0.1
    robust = attacked.standing("autoattack")
    assert (distance[robust] == 0).all()
    with torch.inference_mode():
        predicted = trained()(torch.from_numpy(arrays["x_adv"])).logits.argmax(1).numpy()
    assert ((predicted == arrays["y_test"]) == robust).all()
    assert 0 < robust.sum() < len(robust)


def tampered(place: int, value: int) -> ShardOutcome:
    outcome = strong()
    outcome.per_image["attacked"][place] = value
    return outcome


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (tampered(2, 2), "one more forward pass contradicts AutoAttack on 1 of 4 images"),
        (tampered(0, 1), "one more forward pass contradicts AutoAttack on 1 of 4 images"),
    ],
)
def test_images_that_prove_nothing_are_not_written(outcome: ShardOutcome, reason: str, tmp_path: Path) -> None:
    facts = write_adversarial(outcome, tmp_path)
    assert (facts.file, facts.reason) == (None, reason)
    assert not list(tmp_path.iterdir())


def test_images_in_the_ball_are_written(tmp_path: Path) -> None:
    facts = write_adversarial(strong(), tmp_path)
    assert facts.clean is not None
    assert (facts.images, facts.clean.images, facts.clean.estimate) == (4, 3, 2 / 3)


CHECKS = [
    Check(name, figure, 0.01, outcome, "3.0% stand", "gradients mislead")  # type: ignore[arg-type]
    for name, figure, outcome in (("far", 0.0, "passed"), ("steps", 0.5, "failed"), ("square", None, "not run"))
]


def test_sarif_has_a_rule_and_a_result_for_each_check(tmp_path: Path) -> None:
    report = report_on("a" * 64, fates(90, 70, images=100), audit=Audit.of(CHECKS, 100))
    write_sarif(report, tmp_path / "audit.sarif")
    log = json.loads((tmp_path / "audit.sarif").read_text())
    Draft4Validator(json.loads(SARIF.read_text())).validate(log)
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == ["far", "steps", "square"]
    assert [(rules[each["ruleIndex"]], each["kind"], each["level"]) for each in run["results"]] == [
        ("far", "pass", "none"),
        ("steps", "fail", "error"),
        ("square", "open", "none"),
    ]
    assert all(each["message"]["text"].startswith("3.0% stand") for each in run["results"])


@pytest.mark.parametrize("reason", ["", "one more forward pass contradicts AutoAttack on 1 of 4 images"])
def test_the_page_says_whether_the_accuracy_can_be_reproduced(reason: str, tmp_path: Path) -> None:
    facts = rp.AdversarialFacts(file=None if reason else "adversarial.npz", reason=reason)
    outcome = fates(90, 70, images=100)
    outcome.broken_at["worst"] = outcome.broken_at["autoattack"]
    data = {"name": "digits", "images": 100, "fingerprint": "f00d", "class_names": list("0123456789")}
    report = report_on("a" * 64, outcome, adversarial=facts, data=data)
    write_page(report, [], tmp_path / "report.html", same_attacks=False)
    page = (tmp_path / "report.html").read_text()
    assert ("cannot be reproduced:</b> one more forward pass" in page) == bool(reason)
    assert ("<code>adversarial.npz</code> has AutoAttack" in page) != bool(reason)
