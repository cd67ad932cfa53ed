"""From tasks to the report and its page, on a small trained network."""

import io
import json
import re
from dataclasses import replace
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.report.subjects import digits, settings, trained
from tla_service.attacks import UNBROKEN, Attack, attack_images
from tla_service.attacks.autoattack import ALL_STAGES, ZERO_GRADIENT
from tla_service.errors import ConfigError, UnavailableError
from tla_service.evaluation import results as rs
from tla_service.evaluation import suite
from tla_service.evaluation.detection import fit_detector
from tla_service.evaluation.results import Accuracy, Audit, Check
from tla_service.evaluation.shards import AutoAttackRun, Shard, ShardOutcome
from tla_service.evaluation.suite import minimum_norms_of
from tla_service.inference.detector import Rejector
from tla_service.models import build_model
from tla_service.report import findings as fd
from tla_service.report import schema as rp
from tla_service.report.figures import Figures
from tla_service.report.page import show, size, template, write_page
from tla_service.report.plan import (
    Plan,
    adaptive_tasks,
    attack_tasks,
    audit_tasks,
    bank_rows,
    detection_name,
    embedding_tasks,
    make_plan,
    other_norm_attack,
    protocol,
    query_task,
    radius_name,
    single_tasks,
    smoothing_sigma,
    surrogate_task,
    validation_task,
)
from tla_service.report.tasks import Task, select
from tla_service.training.reporting import Terminal

pytestmark = pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")

CPU = torch.device("cpu")
MODEL = "0123456789ab"


def plan() -> Plan:
    return make_plan(settings(), "digits", "linf", 0.15, has_surrogate=False)


def run(task: Task, seed: int = 0) -> Any:
    source = digits().test if task.split == "test" else digits().train
    parts = []
    for _, rows in task.shards():
        chosen = torch.from_numpy(rows)
        shard = Shard(trained(seed), None, source.fetch(chosen), source.labels[chosen], rows, CPU)
        parts.append(task.measurement.run(shard))
    return task.measurement.merge(parts)


def tasks() -> list[Task]:
    data = digits()
    bank = bank_rows(torch.arange(len(data.train)), data.train.labels, 200)
    made = [*attack_tasks(plan(), settings(), data, MODEL), *embedding_tasks(plan(), settings(), data, MODEL, bank)]
    return made + single_tasks(plan(), settings(), data, MODEL)


@cache
def measured(seed: int = 0) -> dict[tuple[str, str], Any]:
    with patch.object(suite, "run_autoattack", partial(suite.run_autoattack, square_queries=100)):  # 5000 take seconds
        return {task.key: run(task, seed) for task in tasks()}


@cache
def found(seed: int = 0) -> fd.Findings:
    return fd.gather(measured(seed), MODEL, plan(), settings())


@cache
def of_the_gate(gate: bool) -> fd.Findings:
    """What was measured on the images set aside for the gate, or on the others."""
    chosen = digits().gate.numpy() == gate
    return fd.gather(select(measured(), tasks(), chosen), MODEL, plan(), settings())


def report(**changes: Any) -> rp.Report:
    own = found()
    threat = rp.ThreatModel(norm="linf", epsilon=0.15)
    facts = rp.ModelFacts(
        uri="models:/<b>digits</b>/1",
        weights_sha256="0" * 64,
        architecture="digits_cnn",
        method="tla",
        trained_for=threat,
    )
    other = rp.Compared(
        model=facts.model_copy(update={"uri": "other", "method": "at"}),
        accuracy=fd.accuracies(found(1), plan(), 10),
        difference=fd.differences(own, found(1), plan()),
    )
    fields = {
        "model": facts,
        "data": rp.DataFacts(name="digits", images=60, fingerprint="f", class_names=digits().class_names),
        "threat_model": threat,
        "accuracy": fd.accuracies(own, plan(), 10),
        "attacks": fd.attack_facts(plan()),
        "autoattack": fd.autoattack_facts(own, plan()),
        "curves": own.curves,
        "sparse": own.norms,
        "norms": fd.norm_table(own, plan(), "digits", digits().image_shape),
        "corruptions": own.corruptions,
        "calibration": own.calibration,
        "certified": own.certified,
        "detection": own.detection,
        "neighbours": fd.neighbours(own, plan(), settings()),
        "shift": tuple(ratios.at(epsilon) for epsilon, ratios in own.shift.items()),
        "compared": (other,),
        "seed": 0,
        "settings": "d",
        "seconds": 1.0,
        "hardware": "this",
        "gate": rp.GateFacts(images=15, accuracy=fd.accuracies(of_the_gate(True), plan(), 10)),
    }
    return rp.Report.model_validate(fields | changes)


def test_accuracies_are_those_of_plain_counting() -> None:
    images, labels = digits().test.fetch(torch.arange(60)).float() / 255, digits().test.labels

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return trained()(pixels).logits

    table = fd.accuracies(found(), plan(), 10)
    clean = (logits(images).argmax(1) == labels).float().mean().item()
    assert table["clean"].estimate == pytest.approx(clean)
    standing = attack_images(logits, images, labels, plan().columns["fgsm"]).robust
    assert table["fgsm"].estimate == pytest.approx(standing.float().mean().item())
    assert table["worst"].estimate <= min(table[name].estimate for name in plan().columns)
    assert table["autoattack"].images == 20
    assert table["pgd5x2"].estimate < table["clean"].estimate


def test_images_of_the_gate_and_the_others_are_counted_apart() -> None:
    gate = digits().gate.numpy()
    assert 10 <= gate.sum() <= 20
    for name in ("clean", "fgsm", "autoattack"):
        outcome = measured()[MODEL, "autoattack" if name == "autoattack" else "columns"]
        for side in (True, False):
            standing = [
                stands
                for row, stands in zip(outcome.indices.tolist(), outcome.standing(name).tolist(), strict=True)
                if gate[row] == side
            ]
            table = fd.accuracies(of_the_gate(side), plan(), 10)
            assert table[name].images == len(standing) > 0
            assert table[name].estimate == pytest.approx(np.mean(standing))
    own, rest = (of_the_gate(side).embedded["natural"] for side in (True, False))
    assert set(own.rows.tolist()) == set(np.flatnonzero(gate).tolist())
    assert sorted([*own.rows.tolist(), *rest.rows.tolist()]) == list(range(60))
    assert len(of_the_gate(True).embedded["bank"].rows) == 200
    numbers = [each.detection.num_correct for each in (of_the_gate(True), of_the_gate(False), found())]
    assert numbers[0] + numbers[1] == numbers[2]
    assert [of_the_gate(side).norms[0].images for side in (True, False)] == [
        int((gate[task.rows] == side).sum()) for side in (True, False) for task in tasks() if task.name == "l0"
    ]


def test_a_gate_without_images_is_no_error() -> None:
    nothing = fd.gather(select(measured(), tasks(), np.zeros(60, dtype=bool)), MODEL, plan(), settings())
    assert fd.accuracies(nothing, plan(), 10)["autoattack"].estimate is None
    assert nothing.detection is None
    assert [norms.median for norms in nothing.norms] == [None, None]


def test_shards_do_not_depend_on_how_many_there_are_of_other_tasks() -> None:
    task = attack_tasks(plan(), settings(), digits(), MODEL)[0]
    assert [len(rows) for _, rows in task.shards()] == [25, 25, 10]
    again = run(task)
    np.testing.assert_array_equal(again.broken_at["pgd5x2"], found().outcome.broken_at["pgd5x2"])


def test_restarts_are_counted_per_image() -> None:
    outcome = found().outcome
    fates = outcome.broken_at["pgd5x2"]
    assert set(fates.tolist()) <= {UNBROKEN, 0, 1, 2}
    images, labels = digits().test.fetch(torch.arange(25)).float() / 255, digits().test.labels[:25]
    one = Attack(kind="pgd", epsilon=0.15, step_size=0.05, num_steps=5, random_start=False)
    assert not attack_images(lambda x: trained()(x).logits, images, labels, one).robust.all()


def test_embeddings_of_shards_are_those_of_the_whole() -> None:
    natural = found().embedded["natural"]
    with torch.no_grad():
        whole = trained()(digits().test.fetch(torch.from_numpy(natural.rows)).float() / 255)
    np.testing.assert_allclose(natural.embedded.embeddings, whole.embeddings.numpy(), rtol=1e-4, atol=1e-5)


def test_detection_meets_a_larger_radius_than_training() -> None:
    assert plan().detection.epsilon == pytest.approx(1.5 * 0.15)
    assert detection_name(plan()) == radius_name(0.225)
    assert make_plan(settings(), "mnist", "linf", 0.3, has_surrogate=False).detection.epsilon == 0.3
    assert make_plan(settings(), "cifar10", "linf", 8 / 255, has_surrogate=False).detection.epsilon == 25 / 255


def test_protocol_names_what_shapes_the_figures_alone() -> None:
    def digest(**changes: Any) -> str:
        chosen = settings(**changes)
        return protocol(make_plan(chosen, "digits", "linf", 0.15, has_surrogate=False), chosen)

    plain = digest()
    assert digest(output=Path("elsewhere"), log=False, scaling={"num_workers": 7}, data={"root": "/x"}) == plain
    assert digest(model="models:/tla-digits@champion", norm="linf", epsilon=0.15) == plain
    others = [
        digest(seed=1),
        digest(epsilon=0.1),
        digest(norm="l2"),
        digest(batch_size=10),
        digest(images={"curves": 3}),
        digest(certificate={"sigma": 0.1}),
    ]
    assert len({plain, *others}) == 7


def test_a_norm_without_a_radius_takes_the_documented_one() -> None:
    def made(data: str = "digits", **changes: Any) -> Plan:
        return make_plan(settings(**changes), data, "linf", 0.15, has_surrogate=False)

    l2 = made(norm="l2")
    assert (l2.norm, l2.epsilon) == ("l2", 0.6)
    assert {(attack.norm, attack.epsilon) for attack in l2.columns.values()} == {("l2", 0.6)}
    assert made("cifar10", norm="l2").epsilon == 128 / 255
    assert made("mnist", norm="l2", epsilon=1.5).epsilon == 1.5
    assert made(norm="linf").epsilon == 0.15
    # Twice as far as the threat model of an L2 length above 1, not cut down to 1.
    assert made("mnist", norm="l2").detection.epsilon == pytest.approx(3.0)
    with pytest.raises(ConfigError, match=r"norm=l2: no radius is given.*image_folder; give --epsilon in l2"):
        made("image_folder", norm="l2")


def test_an_attack_in_another_norm_takes_the_documented_radius() -> None:
    attacks = {"pgd20": {"num_steps": 20}, "other": {"norm": "l2", "num_steps": 50}, "near": {"epsilon": 0.01}}
    made = make_plan(settings(attacks=attacks), "digits", "linf", 0.15, has_surrogate=False)
    other, near = made.columns["other"], made.columns["near"]
    assert (other.norm, other.epsilon, other.step_size) == ("l2", 0.6, pytest.approx(0.06))
    assert near.step_size == pytest.approx(0.001)
    # Curves and the audit stay in the threat model, and what AutoAttack is held against too.
    assert (made.iterative, made.within) == ("pgd20", ("pgd20",))
    with pytest.raises(ConfigError, match=r"attacks\.a\.norm=l2: .*give attacks\.a\.epsilon in l2"):
        make_plan(settings(attacks={"a": {"norm": "l2"}}), "parquet", "linf", 0.1, has_surrogate=False)
    with pytest.raises(ConfigError, match=r"none of them is PGD with norm linf and epsilon 0\.15"):
        make_plan(settings(attacks={"a": {"norm": "l2"}}), "digits", "linf", 0.15, has_surrogate=False)


def test_the_papers_columns_are_known_as_such() -> None:
    papers = make_plan(settings(attacks={}), "cifar10", "linf", 8 / 255, has_surrogate=True)
    assert papers.is_paper
    assert (papers.iterative, papers.restarted, list(papers.transfer)) == ("pgd20", "pgd20x20", ["transfer_pgd7"])
    assert not make_plan(settings(attacks={}), "cifar10", "linf", 4 / 255, has_surrogate=True).is_paper
    assert not make_plan(settings(attacks={}), "cifar10", "l2", 0.5, has_surrogate=True).is_paper


def test_the_shipped_detector_is_measured_at_its_own_threshold() -> None:
    own = found()
    results = {(MODEL, "columns"): own.outcome} | {(MODEL, name): each for name, each in own.embedded.items()}
    detector = fit_detector(own.embedded["bank"].embedded, covariance="tied")
    natural, attacked = (own.embedded[name].embedded for name in ("natural", detection_name(plan())))
    threshold = float(np.median(detector.score(natural.embeddings, natural.predictions)))
    detection = fd.gather(results, MODEL, plan(), settings(), Rejector(detector, threshold, 0.05, 200, 50)).detection
    assert detection is not None
    shipped = detection.shipped
    assert shipped is not None
    right = [
        score < threshold
        for each in (natural, attacked)
        for score in detector.score(each.embeddings, each.predictions)[each.correct]
    ]
    wrong = [
        score < threshold
        for each in (natural, attacked)
        for score in detector.score(each.embeddings, each.predictions)[~each.correct]
    ]
    assert shipped.false_rejections.estimate == pytest.approx(np.mean(right))
    assert shipped.detected.estimate == pytest.approx(np.mean(wrong))
    assert shipped.false_rejections.images + shipped.detected.images == 120


def test_both_detectors_are_attacked_each_at_its_own_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tla_service.evaluation.adaptive._STEPS", 8)
    few = settings(images={"adaptive": 20, "representation": 60, "bank": 200})
    fitted = fd.fitted_detector(found().embedded["bank"], few)
    natural = found().embedded["natural"].embedded
    shipped = fit_detector(found().embedded["bank"].embedded, covariance="tied")
    median = float(np.median(shipped.score(natural.embeddings, natural.predictions)))
    made = adaptive_tasks(plan(), few, digits(), MODEL, [fitted, shipped])
    assert len({task.name for task in made}) == 4
    held_out = validation_task(plan(), few, digits(), MODEL, torch.arange(500, 600))
    results = measured() | {task.key: run(task) for task in [*made, held_out]}
    kept = ~digits().gate.numpy()
    parts = select(results, [*tasks(), *made, held_out], kept)
    own = fd.gather(parts, MODEL, plan(), few, Rejector(shipped, median, 0.05, 200, 50))
    assert own.detection is not None
    assert own.detection.shipped is not None
    one, two = own.detection.adaptive, own.detection.shipped.adaptive
    assert one is not None
    assert two is not None
    assert one.images == two.images == kept[made[0].rows].sum()
    assert (two.threshold, own.detection.attacked) == (median, two)
    assert two.selective["clean"].coverage.estimate == pytest.approx(0.5, abs=0.25)
    seen = results[held_out.key].embedded
    right = np.sort(fitted.score(seen.embeddings, seen.predictions)[seen.correct])
    assert one.threshold == right[int(0.05 * len(right))]
    for each in (one, two):
        evaded = [each.selective[name].evaded.estimate for name in ("clean", "unaware", "adaptive")]
        assert evaded == sorted(evaded)
        assert each.rejected.estimate >= each.false_rejections.estimate
    figures = Figures(tmp_path, own, plan(), digits().class_names)
    figures.detection()
    write_page(report(detection=own.detection), figures.drawn, tmp_path / "report.html", same_attacks=False)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert all(
        shown in text for shown in ("Under an adaptive attack", "as shipped with the model", "Risk and coverage")
    )
    terminal = io.StringIO()
    show(report(detection=own.detection), tmp_path, Terminal(terminal))
    assert re.search(r"adaptive attack +[\d.]+ %   95%: [\d.]+ to [\d.]+ ", terminal.getvalue())


def test_no_validation_images_leaves_the_threshold_to_training_images() -> None:
    few = settings(images={"adaptive": 8, "representation": 60, "bank": 200})
    fitted = fd.fitted_detector(found().embedded["bank"], few)
    results = measured() | {task.key: run(task) for task in adaptive_tasks(plan(), few, digits(), MODEL, [fitted])}
    detection = fd.gather(results, MODEL, plan(), few).detection
    assert detection is not None
    assert detection.adaptive is not None
    assert (detection.adaptive.threshold_from, detection.adaptive.images) == ("training", 8)


def outcome(standing: list[bool], attack: str) -> ShardOutcome:
    rows = np.arange(len(standing))
    fates = np.where(standing, UNBROKEN, 1).astype(np.int64)
    return ShardOutcome(rows, np.zeros_like(rows), {"clean": np.full(len(rows), UNBROKEN), attack: fates})


@pytest.mark.parametrize(("ours", "weak"), [(90, True), (52, False), (50, False)])
def test_weak_attacks_are_told_apart_from_noise(ours: int, weak: bool) -> None:
    table = outcome([True] * ours + [False] * (100 - ours), "pgd5x2")
    table.broken_at["fgsm"] = np.full(100, UNBROKEN)
    strong = outcome([True] * 50 + [False] * 50, "autoattack")
    strong = replace(strong, autoattack=AutoAttackRun("standard", "linf", 0.15, ("apgd-ce", "square")))
    facts = fd.autoattack_facts(fd.Findings(outcome=table, autoattack=strong), plan())
    assert facts is not None
    assert (facts.strongest, facts.weak) == ("pgd5x2", weak)
    assert facts.gap.difference == pytest.approx(ours / 100 - 0.5)


def test_norm_curves_count_what_stands() -> None:
    found = minimum_norms_of(np.array([0.0, 1.0, 2.0, 2.0, np.inf]), "l0")
    assert (found.images, found.wrong, found.median) == (5, 1, 2.0)
    assert found.curve.x == (0.0, 1.0, 2.0)
    assert [point.estimate for point in found.curve.accuracy] == [0.8, 0.6, 0.2]
    assert minimum_norms_of(np.array([0.0, np.inf, np.inf]), "l1").median is None


def check(name: str, outcome: Any, figure: float | None = 0.0) -> dict[str, Any]:
    return {
        "name": name, "figure": figure, "threshold": 0.1, "outcome": outcome, "statement": f"{name} is so",
        "meaning": "it matters",
    }  # fmt: skip


def autoattacked(warnings: tuple[str, ...], by_square: int = 0) -> ShardOutcome:
    strong = outcome([True] * 100, "autoattack")
    strong.broken_at["autoattack"][:by_square] = 1 + ALL_STAGES.index("square")
    return ShardOutcome(strong.indices, strong.labels, strong.broken_at, warnings=warnings)


def test_the_table_of_norms_names_attack_and_radius_of_each_row() -> None:
    rows = report().norms
    assert [(row.norm, row.attack) for row in rows] == [
        ("linf", "PGD, 5 steps, 2 starts"),
        ("linf", "AutoAttack"),
        ("l2", "PGD, 5 steps, 5 starts"),
        ("l1", "FMN, smallest perturbation found"),
        ("l0", "FMN, smallest perturbation found"),
    ]
    assert [row.epsilon for row in rows] == [0.15, 0.15, 0.6, pytest.approx(10 * 64 / 784), 1]
    sizes = measured()[MODEL, "l1"]
    assert rows[3].accuracy.estimate == pytest.approx(np.mean([size > 10 * 64 / 784 for size in sizes.tolist()]))
    assert rows[3].clean.estimate == pytest.approx(np.mean([size > 0 for size in sizes.tolist()]))
    images, labels = digits().test.fetch(torch.arange(60)).float() / 255, digits().test.labels
    chosen = next(task.rows for task in tasks() if task.name == "other-norm")
    attack = Attack(kind="pgd", norm="l2", epsilon=0.6, step_size=0.3, num_steps=5, num_restarts=5)
    attacked = attack_images(lambda x: trained()(x).logits, images[chosen], labels[chosen], attack)
    assert rows[2].accuracy.estimate == pytest.approx(attacked.robust.float().mean().item(), abs=0.11)  # other starts
    assert rows[0].accuracy.images == 60
    assert rows[2].accuracy.images == len(chosen) == 10


def test_the_other_norm_of_an_l2_model_is_l_infinity() -> None:
    l2 = make_plan(settings(), "digits", "l2", 0.6, has_surrogate=False)
    other = other_norm_attack(l2, "digits", digits().image_shape)
    assert (other.norm, other.epsilon) == ("linf", 0.15)
    assert other_norm_attack(plan(), "image_folder", (3, 32, 32)).epsilon == 128 / 255


def test_corruptions_and_calibration_are_of_the_images_that_are_not_the_gates() -> None:
    rest = of_the_gate(False)
    assert rest.corruptions is not None
    task = next(task for task in tasks() if task.name == "corruptions")
    kept = ~digits().gate.numpy()[task.rows]
    assert rest.corruptions.images == int(kept.sum()) < len(task.rows)
    correct = measured()[MODEL, "corruptions"][kept]
    assert rest.corruptions.mean_error == pytest.approx(1 - correct[:, 1:].mean())
    natural = rest.embedded["natural"].embedded
    assert rest.calibration["clean"].accuracy == rs.share_of(natural.correct)
    assert rest.calibration["attacked"].accuracy.estimate < rest.calibration["clean"].accuracy.estimate


def test_page_shows_norms_corruptions_and_calibration(tmp_path: Path) -> None:
    made = report()
    assert made.corruptions is not None
    assert made.corruptions.mean_error is not None
    write_page(made, [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text()).split())
    assert "Trained for L-infinity 0.15: accuracy in each norm" in text
    assert "L0 1 value FMN, smallest perturbation found" in text
    assert f"The mean corruption error is {100 * made.corruptions.mean_error:.1f} %, not normalised" in text
    for name in ("gaussian noise", "jpeg compression", "Expected calibration error over 15 bins"):
        assert name in text


def test_a_report_without_the_newer_measurements_is_read(tmp_path: Path) -> None:
    content = json.loads(report().model_dump_json())
    for name in ("norms", "corruptions", "calibration"):
        del content[name]
    (tmp_path / rp.REPORT_FILE).write_text(json.dumps(content))
    old = rp.read_report(tmp_path / rp.REPORT_FILE)
    assert (old.norms, old.corruptions, old.calibration) == ((), None, {})
    write_page(old, [], tmp_path / "report.html", same_attacks=False)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Common corruptions" not in text
    assert "Calibration" not in text
    assert "Smallest perturbations" in text


def test_the_audit_counts_what_autoattack_objects_to() -> None:
    measured = Audit.of([Check(**check("a", "passed")), Check(**check("b", "not run", None))], 9)
    table = found().outcome

    def judged(strong: ShardOutcome | None) -> tuple[bool, str, str]:
        results = {"columns": table, "audit": measured} | ({"autoattack": strong} if strong is not None else {})
        audit = fd.gather({(MODEL, name): each for name, each in results.items()}, MODEL, plan(), settings()).audit
        assert audit is not None
        return audit.trusted, audit.checks[-1].outcome, audit.summary

    assert found().audit is None
    assert judged(autoattacked(())) == (
        True,
        "passed",
        "2 of 5 checks passed, 3 not run (b, attacks_find_planted_examples, white_box_against_relatives)",
    )
    assert judged(autoattacked((ZERO_GRADIENT,)))[:2] == (True, "passed")
    assert judged(autoattacked(("it seems random",)))[:2] == (False, "failed")
    assert judged(None)[:2] == (True, "not run")
    assert fd.autoattack_warnings(autoattacked((), by_square=1))[0].startswith(
        "Square, which sees no gradients, breaks 1"
    )


def test_the_surrogate_of_the_audit_is_trained_and_kept_as_any_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tla_service.evaluation.surrogate._STEPS", 30)
    task = surrogate_task(plan(), digits(), MODEL)
    trained_here, again = run(task), run(task)
    facts = trained_here.facts
    assert (facts.steps, facts.images + facts.held_out) == (30, len(digits().train))
    network = build_model(facts.architecture, 10, digits().image_shape)
    network.load_state_dict(trained_here.weights)
    assert all(torch.equal(value, again.weights[name]) for name, value in trained_here.weights.items())
    assert audit_tasks(plan(), settings(images={"audit": 0}), digits(), MODEL, "") == []
    few = settings(images={"audit": 10, "unit_tests": 0})
    (audited,) = audit_tasks(plan(), few, digits(), MODEL, "the images are too small")
    results = {"columns": found().outcome, "audit": run(audited), "surrogate": trained_here}
    results["autoattack"] = autoattacked(())
    audit = fd.gather({(MODEL, name): each for name, each in results.items()}, MODEL, plan(), settings()).audit
    assert audit is not None
    assert [c.statement for c in audit.checks if c.outcome == "not run"] == [
        "the images are too small",
        "not asked for (images.unit_tests)",
        "no relative was attacked",
    ]
    assert audit.surrogate == facts


def transferred(fallen: list[int], rows: range, source: str) -> ShardOutcome:
    """Examples of a relative, which break these of the rows and of those that are misclassified when clean."""
    clean = found().outcome.broken_at["clean"]
    indices = np.array(rows)
    broken = np.array([1 if row in fallen else UNBROKEN for row in rows])
    return ShardOutcome(indices, found().outcome.labels[indices], {"clean": clean[indices], source: broken})


def test_an_image_that_a_relative_breaks_is_broken() -> None:
    table = found().outcome
    white = np.logical_and.reduce([table.standing(name) for name in plan().within])
    standing, fallen = np.flatnonzero(white), np.flatnonzero(~white)
    examples = [standing[0], standing[1], fallen[0]]
    one = transferred(examples, range(50), "last")
    other = transferred([standing[2]], range(50), "natural")
    audit = Audit.of([Check(**check("a", "passed"))], 9)
    results: dict[str, Any] = {"columns": table, "audit": audit, "transfer-last-00": one, "transfer-natural-00": other}
    mine = fd.gather({(MODEL, name): each for name, each in results.items()}, MODEL, plan(), settings())

    before, after = fd.accuracies(found(), plan(), 10), fd.accuracies(mine, plan(), 10)
    worst = np.logical_and.reduce([table.standing(name) for name in ("clean", *plan().columns)])
    worst[[standing[0], standing[1], standing[2]]] = False
    assert after["worst"].estimate == pytest.approx(worst.mean())
    assert before["worst"].estimate > after["worst"].estimate
    assert all(after[name] == before[name] for name in after if name != "worst")

    assert mine.audit is not None
    (masked,) = [each for each in mine.audit.checks if each.name == "white_box_against_relatives"]
    assert (masked.outcome, masked.figure) == ("failed", pytest.approx(3 / 50))
    assert not mine.audit.trusted
    assert masked.statement.startswith(f"3 of {int(white[:50].sum())} images")
    assert masked.statement.endswith("(last 2, natural 1)")

    tried = (rs.Relative("pretrained", "p", why="it is gone"), rs.Relative("last", "l"), rs.Relative("natural", "n"))
    gone, last, _ = fd.relatives(mine, tried)
    assert gone == tried[0]
    assert last.accuracy == rs.wilson_interval(47, 50)


def test_the_page_shows_relatives_and_planted_examples(tmp_path: Path) -> None:
    relatives = (
        rs.Relative("last", "its weights after the last epoch", rs.wilson_interval(30, 40)),
        rs.Relative("average", "an average", why="there is <none>"),
    )
    attacks = tuple(rs.AttackTest(name, rs.wilson_interval(9, 10), judged=name != "fgsm") for name in ("fgsm", "pgd"))
    tests = rs.UnitTests(12, rs.wilson_interval(1, 10), attacks, 0.8)
    write_page(report(relatives=relatives, unit_tests=tests), [], tmp_path / "a.html", same_attacks=False)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "a.html").read_text()).split())
    assert "last its weights after the last epoch 75.0 59.8 to 85.8 40" in text
    assert "average an average left out: there is &lt;none&gt;" in text
    assert "fgsm 90.0 59.6 to 98.2 not judged: one step pgd 90.0 59.6 to 98.2 80" in text
    assert "random sampling 10.0" in text
    assert "10 of 12 test images" in text
    why = rs.UnitTests(12, rs.wilson_interval(0, 0), (), 0.8, "the balls overlap")
    write_page(report(unit_tests=why), [], tmp_path / "b.html", same_attacks=False)
    assert "Attack unit tests were not run: the balls overlap." in (tmp_path / "b.html").read_text()


def test_page_shows_outcomes_warnings_and_the_surrogate(tmp_path: Path) -> None:
    own = {
        "architecture": "small_cnn",
        "images": 1212,
        "steps": 500,
        "seconds": 3.4,
        "clean_accuracy": 0.975,
        "held_out": 135,
    }
    checks = [check("a", "passed"), check("b", "failed"), check("c", "not run", None)]
    audit = {"trusted": False, "images": 9, "checks": checks, "surrogate": own}
    facts = report().autoattack
    assert facts is not None
    (other,) = report().compared
    made = report(
        audit=audit,
        autoattack=facts.model_copy(update={"warnings": ("it <seems> random",)}),
        compared=(other.model_copy(update={"warnings": ("so does this",)}),),
    )
    write_page(made, [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert "1 of 3 checks passed, 1 failed (b), 1 not run (c)" in text
    assert all(shown in text for shown in ("✓ passed", "✗ failed", "- not run", "c is so"))
    assert "small_cnn, 500 steps on 1212 training images in 3 s, clean accuracy 97.5 % on 135 held-out ones" in text
    assert "AutoAttack warns: it <seems> random" in text
    assert "AutoAttack warns about other: so does this" in text


def test_page_names_another_threat_model_of_an_attack(tmp_path: Path) -> None:
    attacks = report().attacks
    l2 = attacks["fgsm"].model_copy(update={"norm": "l2", "epsilon": 0.6})
    write_page(report(attacks=attacks | {"fgsm": l2}), [], tmp_path / "report.html", same_attacks=False)
    assert "FGSM, one step, up to 0.6 in L2" in (tmp_path / "report.html").read_text()


def test_report_is_read_back_and_is_plain_json(tmp_path: Path) -> None:
    path = tmp_path / rp.REPORT_FILE
    rp.write_report(report(), path)
    assert rp.read_report(path) == report()
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99}'])
def test_a_damaged_report_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UnavailableError, match="evaluate the model again"):
        rp.read_report(tmp_path / "report.json")


class Page(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_every_figure_and_fetches_nothing(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "figures", found(), plan(), digits().class_names)
    figures.accuracy()
    figures.curves()
    figures.beyond()
    figures.certified()
    figures.detection()
    figures.shift({"AT": found(1)}, "TLA")
    figures.maps(settings(), "digits")
    natural = found().embedded["natural"]
    figures.queries(run(query_task(plan(), MODEL, natural.rows[:2])), digits(), settings())
    assert len({figure.path for figure in figures.drawn}) == len(figures.drawn) >= 10
    write_page(report(), figures.drawn, tmp_path / "report.html", same_attacks=False)
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.images) == len(figures.drawn)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert all(image["alt"] for image in page.images)
    for figure in figures.drawn:
        assert figure.path.stat().st_size > 5000
        assert figure.title in page.text
    assert "<b>digits</b>" in page.text  # a name is text, never markup
    assert re.search(r"TLA minus AT", page.text)
    assert "Not audited" in page.text


def test_page_says_which_images_are_the_gates(tmp_path: Path) -> None:
    rest = fd.accuracies(of_the_gate(False), plan(), 10)
    count = int(digits().gate.sum())
    gate = rp.GateFacts(images=count, accuracy=fd.accuracies(of_the_gate(True), plan(), 10))
    write_page(report(accuracy=rest, gate=gate), [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text()).split())
    assert f"Figures are of {60 - count} of the 60 test images. The other {count} are set aside" in text
    assert "gate, % gate images" in text
    clean, own = rest["clean"], gate.accuracy["clean"]
    assert own.estimate is not None
    line = text[text.index("clean no attack") :]
    assert f"{clean.images} {100 * own.estimate:.1f} {own.images} " in line[:80]


@pytest.mark.parametrize("with_autoattack", [True, False])
def test_classes_are_listed_the_weakest_first(tmp_path: Path, with_autoattack: bool) -> None:
    def figures(share: rs.Share) -> str:
        estimate = "-" if share.estimate is None else f"{100 * share.estimate:.1f}"
        return f"{estimate} {100 * share.low:.1f} to {100 * share.high:.1f} {share.images}"

    table = fd.accuracies(found(), plan(), 10)
    made = report(accuracy=table if with_autoattack else {k: v for k, v in table.items() if k != "autoattack"})
    right: dict[int, list[bool]] = {}
    columns = measured()[MODEL, "columns"]
    names = ("clean", *plan().columns, *plan().transfer)
    standing = np.logical_and.reduce([columns.standing(name) for name in names])
    for label, stands in zip(columns.labels.tolist(), standing.tolist(), strict=True):
        right.setdefault(label, []).append(stands)
    weakest = min(range(10), key=lambda label: sum(right[label]) / len(right[label]))
    expected = rs.wilson_interval(sum(right[weakest]), len(right[weakest]))

    write_page(made, [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text()).split())
    assert f"Worst class: {weakest} , {100 * expected.estimate:.1f} %" in text
    shown = [name for name in ("clean", "worst", "autoattack") if name in made.accuracy]
    rows = {
        label: f" {label} {' '.join(figures(table[name].per_class[label]) for name in shown)} " for label in range(10)
    }
    places = {label: text.index(row) for label, row in rows.items()}
    assert min(places, key=places.__getitem__) == weakest
    robust = [table["worst"].per_class[label].estimate for label in sorted(places, key=places.__getitem__)]
    assert robust == sorted(robust)

    stream = io.StringIO()
    show(made, tmp_path, Terminal(stream))
    (line,) = [line for line in stream.getvalue().splitlines() if line.startswith("worst class")]
    assert f"{100 * expected.estimate:.2f} %   95%: {100 * expected.low:.1f} to {100 * expected.high:.1f}" in line
    assert f"({weakest}, {len(right[weakest])} images)" in line


def test_the_papers_figures_stand_beside_those_of_all_test_images(tmp_path: Path) -> None:
    """7,500 images are reported on and 2,500 are the gate's: together the paper's 10,000."""
    most, rest = (
        Accuracy(estimate=estimate, low=0, high=1, images=images) for estimate, images in ((0.9, 7500), (0.5, 2500))
    )
    names = ("clean", "fgsm", "worst")
    facts = report().model.model_copy(update={"architecture": "mnist_cnn"})
    page = report(
        model=facts,
        data=rp.DataFacts(name="mnist", images=10_000, fingerprint="f", class_names=digits().class_names),
        accuracy=dict.fromkeys(names, most),
        gate=rp.GateFacts(images=2500, accuracy=dict.fromkeys(names, rest)),
        compared=(),
    )
    write_page(page, [], tmp_path / "report.html", same_attacks=True)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text()).split())
    assert "all test images, % paper, %" in text
    assert "90.0 0.0 to 100.0 7500 50.0 2500 80.00 99.52" in text


def test_page_shows_the_papers_figures_only_in_its_setting(tmp_path: Path) -> None:
    write_page(report(), [], tmp_path / "report.html", same_attacks=True)
    assert "the paper has no digits" in (tmp_path / "report.html").read_text()


def test_certificates_are_of_the_report_images_and_come_with_autoattacks_verdict(tmp_path: Path) -> None:
    own = of_the_gate(False).certified
    assert own is not None
    rows = measured()[MODEL, "certified"]
    rest = rows[~digits().gate.numpy()[rows["index"]]]
    assert (own.images, own.sigma) == (len(rest), 0.15) < (len(rows), 1.0)
    assert own.accuracy.estimate == np.mean(rest["predicted"] == rest["label"])
    strong = of_the_gate(False).autoattack
    assert strong is not None
    shared = np.isin(strong.indices, rest["index"])
    assert own.autoattack == rs.share_of(strong.standing("autoattack")[shared])
    assert own.smoothed_broken == 0
    l2 = make_plan(settings(norm="l2"), "digits", "linf", 0.15, has_surrogate=False)
    assert smoothing_sigma(l2, settings()) == 0.3
    assert smoothing_sigma(l2, settings(certificate={"sigma": "1/4"})) == 0.25
    assert "certified" not in {
        task.name for task in single_tasks(plan(), settings(images={"certified": 0}), digits(), MODEL)
    }

    write_page(report(certified=own), [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert f" = 0.15, on {own.images} images with 100 noisy copies each" in text
    assert f"which guarantees only {own.median_radius:.4g} in L-infinity" in text
    assert "certificates are contradicted" not in text
    write_page(report(certified=replace(own, smoothed_broken=3)), [], tmp_path / "report.html", same_attacks=False)
    assert "3 certificates are contradicted" in (tmp_path / "report.html").read_text()
    before = json.loads(report().model_dump_json())
    del before["certified"]  # as reports made before there were certificates
    assert rp.Report.model_validate(before).certified is None


def test_radii_read_as_people_write_them() -> None:
    assert [size(8 / 255), size(0.3), size(0.15), size(8 / 255, "l2")] == ["8/255", "0.3", "0.15", "0.03137"]


def test_cards_and_pages_show_names_as_text() -> None:
    name = "<script>alert('x')</script>"
    assert (
        template("model_card.md.j2").environment.from_string("{{ name }}").render(name=name).startswith("&lt;script>")
    )
    shown = template("report.html.j2").environment.from_string("{{ name }}{{ 1.5 }}").render(name=name)
    assert shown == "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;1.5"
