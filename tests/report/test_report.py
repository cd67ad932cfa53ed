"""From tasks to the report, on a small trained network."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.report.measured import MODEL, Page, check, found, measured, of_the_gate, plan, report, run, tasks
from tests.report.subjects import digits, trained
from tla_service.attacks import UNBROKEN, Attack, attack_images
from tla_service.attacks.autoattack import ALL_STAGES, ZERO_GRADIENT
from tla_service.errors import UnavailableError
from tla_service.evaluation import results as rs
from tla_service.evaluation.detection import fit_detector
from tla_service.evaluation.results import Audit, Check
from tla_service.evaluation.shards import AutoAttackRun, ShardOutcome
from tla_service.evaluation.suite import minimum_norms_of
from tla_service.inference.detector import Rejector
from tla_service.models import build_model
from tla_service.report import findings as fd
from tla_service.report import schema as rp
from tla_service.report import tables as tb
from tla_service.report.figures import Figures
from tla_service.report.page import show, write_page
from tla_service.report.plan import (
    detection_name,
    smoothing_sigma,
)
from tla_service.report.task_list import (
    adaptive_tasks,
    attack_tasks,
    audit_tasks,
    single_tasks,
    surrogate_task,
    validation_task,
)
from tla_service.report.tasks import select
from tla_service.training.reporting import Terminal

pytestmark = pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")


def test_accuracies_are_those_of_plain_counting() -> None:
    images, labels = digits().test.fetch(torch.arange(60)).float() / 255, digits().test.labels

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return trained()(pixels).logits

    table = tb.accuracies(found(), plan(), 10)
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
            table = tb.accuracies(of_the_gate(side), plan(), 10)
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
    nothing = fd.gather(select(measured(), tasks(), np.zeros(60, dtype=bool)), MODEL, plan())
    assert tb.accuracies(nothing, plan(), 10)["autoattack"].estimate is None
    assert nothing.detection is None
    assert [norms.median for norms in nothing.norms] == [None, None]


def test_shards_do_not_depend_on_how_many_there_are_of_other_tasks() -> None:
    task = attack_tasks(plan(), digits(), MODEL)[0]
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


def test_the_shipped_detector_is_measured_at_its_own_threshold() -> None:
    own = found()
    results = {(MODEL, "columns"): own.outcome} | {(MODEL, name): each for name, each in own.embedded.items()}
    detector = fit_detector(own.embedded["bank"].embedded, covariance="tied")
    natural, attacked = (own.embedded[name].embedded for name in ("natural", detection_name(plan())))
    threshold = float(np.median(detector.score(natural.embeddings, natural.predictions)))
    detection = fd.gather(results, MODEL, plan(), Rejector(detector, threshold, 0.05, 200, 50)).detection
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
    # An image counts twice, natural and attacked; its two rows together are no more evidence than half of them.
    half = rs.wilson_interval(sum(wrong) // 2, len(wrong) // 2)
    assert (shipped.detected.low, shipped.detected.high) == (half.low, half.high)


def test_both_detectors_are_attacked_each_at_its_own_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tla_service.evaluation.adaptive._STEPS", 8)
    few = plan(images={"adaptive": 20, "representation": 60, "bank": 200})
    fitted = fd.fitted_detector(found().embedded["bank"], few)
    natural = found().embedded["natural"].embedded
    shipped = fit_detector(found().embedded["bank"].embedded, covariance="tied")
    median = float(np.median(shipped.score(natural.embeddings, natural.predictions)))
    made = adaptive_tasks(few, digits(), MODEL, [fitted, shipped])
    assert len({task.name for task in made}) == 4
    held_out = validation_task(few, digits(), MODEL, torch.arange(500, 600))
    results = measured() | {task.key: run(task) for task in [*made, held_out]}
    kept = ~digits().gate.numpy()
    parts = select(results, [*tasks(), *made, held_out], kept)
    own = fd.gather(parts, MODEL, few, Rejector(shipped, median, 0.05, 200, 50))
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
    few = plan(images={"adaptive": 8, "representation": 60, "bank": 200})
    fitted = fd.fitted_detector(found().embedded["bank"], few)
    results = measured() | {task.key: run(task) for task in adaptive_tasks(few, digits(), MODEL, [fitted])}
    detection = fd.gather(results, MODEL, few).detection
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
    facts = tb.autoattack_facts(fd.Findings(outcome=table, autoattack=strong), plan())
    assert facts is not None
    assert (facts.strongest, facts.weak) == ("pgd5x2", weak)
    assert facts.gap.difference == pytest.approx(ours / 100 - 0.5)


def test_the_curve_of_restarts_is_of_an_attack_of_its_kind() -> None:
    attacks = {
        "pgd50": {"num_steps": 50},
        "pgd20x2": {"num_steps": 20, "num_restarts": 2},
        "cw": {"kind": "cw", "num_restarts": 10},
        "far": {"epsilon": 0.3, "num_restarts": 10},
    }
    results = {(MODEL, "columns"): outcome([True, False], "pgd20x2")}
    steps, restarts = fd.gather(results, MODEL, plan(attacks=attacks)).curves
    assert (steps.attack, steps.x) == ("pgd20x2: 2 starts of 20", (20.0, 40.0))
    assert (restarts.attack, restarts.x) == ("pgd20x2: pgd20x2", (1.0, 2.0))


def test_norm_curves_count_what_stands() -> None:
    found = minimum_norms_of(np.array([0.0, 1.0, 2.0, 2.0, np.inf]), "l0")
    assert (found.images, found.wrong, found.median) == (5, 1, 2.0)
    assert found.curve.x == (0.0, 1.0, 2.0)
    assert [point.estimate for point in found.curve.accuracy] == [0.8, 0.6, 0.2]
    assert minimum_norms_of(np.array([0.0, np.inf, np.inf]), "l1").median is None


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
        audit = fd.gather({(MODEL, name): each for name, each in results.items()}, MODEL, plan()).audit
        assert audit is not None
        return audit.trusted, audit.checks[-1].outcome, audit.summary

    assert found().audit is None
    assert judged(autoattacked(())) == (
        True,
        "passed",
        "3 of 6 checks passed, 3 not run (b, attacks_find_planted_examples, white_box_against_relatives)",
    )
    assert judged(autoattacked((ZERO_GRADIENT,)))[:2] == (True, "passed")
    assert judged(autoattacked(("it seems random",)))[:2] == (False, "failed")
    assert judged(None)[:2] == (True, "not run")
    assert tb.autoattack_warnings(autoattacked((), by_square=1))[0].startswith(
        "Square, which sees no gradients, breaks 1"
    )


@pytest.mark.parametrize(("late", "outcome"), [(0, "passed"), (1, "passed"), (4, "failed")])
def test_the_audit_counts_images_that_only_later_starts_break(late: int, outcome: str) -> None:
    """Most of 60 images stand, or fall at the first start; more than one in twenty are too many."""
    name = plan().restarted
    assert name is not None
    broken_at = np.full(60, UNBROKEN)
    broken_at[:20], broken_at[20 : 20 + late] = 1, 2
    table = replace(found().outcome, indices=np.arange(60), labels=np.zeros(60, int), broken_at={name: broken_at})
    check = fd._restarts_check(table, plan())
    assert (check.name, check.outcome, check.figure) == ("restarts_gain_little", outcome, pytest.approx(late / 60))
    assert f"{40 / 60:.1%} stand after one start, {(40 - late) / 60:.1%} after" in check.statement
    single = plan(attacks={"pgd5": {"num_steps": 5}})
    assert fd._restarts_check(table, single).outcome == "not run"


def test_the_surrogate_of_the_audit_is_trained_and_kept_as_any_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tla_service.evaluation.surrogate._STEPS", 30)
    task = surrogate_task(plan(), digits(), MODEL)
    trained_here, again = run(task), run(task)
    facts = trained_here.facts
    assert (facts.steps, facts.images + facts.held_out) == (30, len(digits().train))
    network = build_model(facts.architecture, 10, digits().image_shape)
    network.load_state_dict(trained_here.weights)
    assert all(torch.equal(value, again.weights[name]) for name, value in trained_here.weights.items())
    few = plan(images={"audit": 10, "unit_tests": 0})
    (audited,) = audit_tasks(few, digits(), MODEL, "the images are too small")
    results = {"columns": found().outcome, "audit": run(audited), "surrogate": trained_here}
    results["autoattack"] = autoattacked(())
    audit = fd.gather({(MODEL, name): each for name, each in results.items()}, MODEL, plan()).audit
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
    mine = fd.gather({(MODEL, name): each for name, each in results.items()}, MODEL, plan())

    before, after = tb.accuracies(found(), plan(), 10), tb.accuracies(mine, plan(), 10)
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
    gone, last, _ = tb.relatives(mine, tried)
    assert gone == tried[0]
    assert last.accuracy == rs.wilson_interval(47, 50)


def test_report_is_read_back_and_is_plain_json(tmp_path: Path) -> None:
    path = tmp_path / rp.REPORT_FILE
    rp.write_report(report(), path)
    assert rp.read_report(path) == report()
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99}'])
def test_a_damaged_report_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UnavailableError, match=rf"delete {tmp_path} and give the same command"):
        rp.read_report(tmp_path / "report.json")


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
    assert smoothing_sigma(plan(norm="l2")) == 0.3
    assert smoothing_sigma(plan(norm="l2", certificate={"sigma": "1/4"})) == 0.25
    assert "certified" not in {task.name for task in single_tasks(plan(images={"certified": 0}), digits(), MODEL)}

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
