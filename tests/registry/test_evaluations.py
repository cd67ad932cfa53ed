"""What an evaluation leaves in MLflow: files and metrics with the run, tags and the card with the right versions."""

from pathlib import Path

import pytest

from tla_service.config import RunConfig, TrackingConfig
from tla_service.evaluation.results import Accuracy, Difference, Relative, Share
from tla_service.registry.evaluations import evaluation_card, log_evaluation
from tla_service.report import schema as rp
from tla_service.report.schema import artifact_folder
from tla_service.tracking.connection import client
from tla_service.tracking.runs import open_run

TRAINED_FOR = rp.ThreatModel(norm="linf", epsilon=0.1)
TINY = rp.ThreatModel(norm="l2", epsilon=1e-6)


def report(run_id: str, sha256: str, threat: rp.ThreatModel = TRAINED_FOR, better: float = 0.0) -> rp.Report:
    """Two classes, one attack and AutoAttack."""
    per_class = tuple(Share(estimate=share, low=0, high=1, images=5) for share in (0.8, 0.4))
    accuracy = {
        name: Accuracy(estimate=share + better, low=0.1, high=0.9, images=10, per_class=per_class)
        for name, share in {"clean": 0.9, "pgd20": 0.7, "worst": 0.6, "autoattack": 0.5}.items()
    }
    gap = Difference(difference=0.1, low=0, high=0.2, p_value=0.5, images=10)
    pgd = rp.AttackFacts(kind="pgd", norm="linf", epsilon=0.1, step_size=0.01, num_steps=20, num_restarts=1)
    return rp.Report(
        model=rp.ModelFacts(
            uri="models:/m-1",
            run_id=run_id,
            weights_sha256=sha256,
            architecture="digits_cnn",
            method="tla",
            trained_for=TRAINED_FOR,
        ),
        data=rp.DataFacts(name="digits", images=10, fingerprint="f", class_names=("cat", "dog")),
        threat_model=threat,
        accuracy=accuracy,
        attacks={"pgd20": pgd},
        autoattack=rp.AutoAttackFacts(
            stages=("square",),
            left_out={},
            broken_by={"square": 1},
            strongest="pgd20",
            gap=gap,
            weak=False,
            version="standard",
        ),
        seed=0,
        settings="d",
        seconds=1,
        hardware="this",
        gate=rp.GateFacts(images=4, accuracy=accuracy),
    )


def test_only_versions_of_the_evaluated_weights_are_tagged(local_uri: str, tmp_path: Path) -> None:
    run_id = open_run(RunConfig(tracking=TrackingConfig(uri=local_uri)), "key", facts={})
    made = client(local_uri)
    made.create_registered_model("tla-digits")
    for sha256 in ("a" * 64, "b" * 64):
        made.create_model_version("tla-digits", str(tmp_path), run_id=run_id, tags={"weights_sha256": sha256})
    found = report(run_id, "a" * 64)
    json, figure = tmp_path / "report.json", tmp_path / "one.png"
    rp.write_report(found, json)
    figure.write_text("figure")
    for _ in range(2):  # again changes nothing; an evaluation may have no page
        assert log_evaluation(local_uri, found, {"report.json": json, "figures/one.png": figure}) == ("tla-digits/1",)

    version = made.get_model_version("tla-digits", "1")
    assert version.tags["tla.report"] == artifact_folder("a" * 64, TRAINED_FOR)
    assert version.tags["tla.accuracy.clean"] == "0.900000"
    assert version.tags["tla.audit.trusted"] == "not run"
    assert "weakest class is dog, with 40.0 %" in version.description
    assert run_id in version.description
    assert "tla.report" not in made.get_model_version("tla-digits", "2").tags
    assert not made.get_model_version("tla-digits", "2").description
    stored = {artifact.path for artifact in made.list_artifacts(run_id, artifact_folder("a" * 64, TRAINED_FOR))}
    assert stored == {
        f"{artifact_folder('a' * 64, TRAINED_FOR)}/report.json",
        f"{artifact_folder('a' * 64, TRAINED_FOR)}/figures",
    }
    measured = made.get_run(run_id).data.metrics["evaluation/accuracy/autoattack"]
    assert measured == 0.5
    assert len(made.get_metric_history(run_id, "evaluation/accuracy/autoattack")) == 1

    accuracy = {name: share for name, share in found.accuracy.items() if name != "autoattack"}
    rp.write_report(without := found.model_copy(update={"accuracy": accuracy, "autoattack": None}), json)
    log_evaluation(local_uri, without, {"report.json": json})
    kept = {name for name in version.tags if not name.endswith("accuracy.autoattack")}
    assert made.get_model_version("tla-digits", "1").tags.keys() == kept, "no figure of the evaluation before"


def logged(uri: str, tmp_path: Path, *reports: rp.Report) -> str:
    """Log reports of one model's weights, which are registered as tla-digits/1; returns the run."""
    made = client(uri)
    run_id = str(reports[0].model.run_id)
    made.create_registered_model("tla-digits")
    made.create_model_version("tla-digits", str(tmp_path), run_id=run_id, tags={"weights_sha256": "a" * 64})
    for found in reports:
        files = {name: tmp_path / name for name in ("report.json", "report.html")}
        rp.write_report(found, files["report.json"])
        files["report.html"].write_text("page")
        assert log_evaluation(uri, found, files) == ("tla-digits/1",)
    return run_id


@pytest.mark.parametrize("trained_first", [True, False])
def test_evaluations_under_two_threat_models_stay_apart(local_uri: str, tmp_path: Path, trained_first: bool) -> None:
    run_id = open_run(RunConfig(tracking=TrackingConfig(uri=local_uri)), "key", facts={})
    pair = [report(run_id, "a" * 64), report(run_id, "a" * 64, TINY, better=0.1)]
    logged(local_uri, tmp_path, *(pair if trained_first else pair[::-1]))
    made = client(local_uri)
    folders = {artifact.path for artifact in made.list_artifacts(run_id, "evaluation/aaaaaaaaaaaa")}
    assert folders == {"evaluation/aaaaaaaaaaaa/linf-0.1", "evaluation/aaaaaaaaaaaa/l2-1e-06"}

    version = made.get_model_version("tla-digits", "1")
    assert version.tags["tla.evaluation.linf-0.1.accuracy.autoattack"] == "0.500000"
    assert version.tags["tla.evaluation.l2-1e-06.accuracy.autoattack"] == "0.600000"
    assert version.tags["tla.evaluation.l2-1e-06.report"] == "evaluation/aaaaaaaaaaaa/l2-1e-06"
    assert version.tags["tla.accuracy.autoattack"] == "0.500000"  # of what it was trained for

    about, others = version.description.split("## Other threat models")
    assert "0.1 in L-infinity norm" in about
    assert "weakest class is dog, with 40.0 %" in about
    assert "| l2 1e-06 | 100.0 | 70.0 | 60.0 | not run | `evaluation/aaaaaaaaaaaa/l2-1e-06` |" in others

    metrics = made.get_run(run_id).data.metrics
    assert metrics["evaluation/accuracy/autoattack"] == metrics["evaluation/linf-0.1/accuracy/autoattack"] == 0.5
    assert metrics["evaluation/l2-1e-06/accuracy/autoattack"] == 0.6


def test_the_card_of_many_evaluations_fits(tmp_path: Path) -> None:
    found = report("run", "a" * 64)
    threats = [rp.ThreatModel(norm="l2", epsilon=number) for number in range(1, 60)]
    others = {f"evaluation/aaaaaaaaaaaa/{threat.slug}": report("run", "a" * 64, threat) for threat in threats}
    card = evaluation_card(found, others)
    assert "| worst | every attack above |" in card
    assert 4500 < len(card) <= 5000
    shown = card.count("| l2 ")
    assert f"{59 - shown} more" in card

    relatives = (
        Relative("last", "of the last epoch", Share(0.9, 0.8, 1.0, 10)),
        Relative("natural", "natural", why="no"),
    )
    card = evaluation_card(found.model_copy(update={"relatives": relatives}), {})
    assert "| worst | every attack above and every example transferred from relatives |" in card
