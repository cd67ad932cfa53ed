"""What an evaluation leaves in MLflow: files and metrics with the run, tags and the card with the right versions."""

from pathlib import Path

import pytest

from tla_service.config import RunConfig, TrackingConfig
from tla_service.registry import log_evaluation, open_run
from tla_service.registry.connection import client
from tla_service.report import schema as rp
from tla_service.report.schema import artifact_folder


def report(run_id: str, sha256: str) -> rp.Report:
    """Two classes, one attack and AutoAttack."""
    per_class = tuple(rp.Share(estimate=share, low=0, high=1, images=5) for share in (0.8, 0.4))
    accuracy = {
        name: rp.Accuracy(estimate=share, low=0.1, high=0.9, images=10, per_class=per_class)
        for name, share in {"clean": 0.9, "pgd20": 0.7, "worst": 0.6, "autoattack": 0.5}.items()
    }
    gap = rp.Difference(difference=0.1, low=0, high=0.2, p_value=0.5, images=10)
    pgd = rp.AttackFacts(kind="pgd", norm="linf", epsilon=0.1, step_size=0.01, num_steps=20, num_restarts=1)
    return rp.Report(
        model=rp.ModelFacts(
            uri="models:/m-1", run_id=run_id, weights_sha256=sha256, architecture="digits_cnn", method="tla"
        ),
        data=rp.DataFacts(name="digits", images=10, fingerprint="f", class_names=("cat", "dog")),
        threat_model=rp.ThreatModel(norm="linf", epsilon=0.1),
        accuracy=accuracy,
        attacks={"pgd20": pgd},
        autoattack=rp.AutoAttackFacts(
            stages=("square",), left_out={}, broken_by={"square": 1}, strongest="pgd20", gap=gap, weak=False
        ),
        seed=0,
        settings="d",
        seconds=1,
        hardware="this",
    )


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_only_versions_of_the_evaluated_weights_are_tagged(uri: str, tmp_path: Path) -> None:
    run_id = open_run(RunConfig(tracking=TrackingConfig(uri=uri)), "key", facts={})
    made = client(uri)
    made.create_registered_model("tla-digits")
    for sha256 in ("a" * 64, "b" * 64):
        made.create_model_version("tla-digits", str(tmp_path), run_id=run_id, tags={"weights_sha256": sha256})
    found = report(run_id, "a" * 64)
    page = tmp_path / "report.html"
    page.write_text("page")
    for _ in range(2):  # again changes nothing
        assert log_evaluation(uri, found, {"report.html": page, "figures/one.png": page}) == ("tla-digits/1",)

    version = made.get_model_version("tla-digits", "1")
    assert version.tags["tla.report"] == artifact_folder("a" * 64)
    assert version.tags["tla.accuracy.clean"] == "0.900000"
    assert version.tags["tla.audit.trusted"] == "not run"
    assert "weakest class is dog, with 40.0 %" in version.description
    assert run_id in version.description
    assert "tla.report" not in made.get_model_version("tla-digits", "2").tags
    assert not made.get_model_version("tla-digits", "2").description
    stored = {artifact.path for artifact in made.list_artifacts(run_id, artifact_folder("a" * 64))}
    assert stored == {f"{artifact_folder('a' * 64)}/report.html", f"{artifact_folder('a' * 64)}/figures"}
    measured = made.get_run(run_id).data.metrics["evaluation/accuracy/autoattack"]
    assert measured == 0.5
    assert len(made.get_metric_history(run_id, "evaluation/accuracy/autoattack")) == 1
