"""The gate lets through what it should, explains itself, and undoes."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking._tracking_service.utils import _get_store

from jobs import promote_model
from tests.registry.evaluations import evaluate, fates, register_another, report_on
from tests.registry.tracking_server import Packaged
from tla_service.config.loading import read_settings
from tla_service.errors import ConfigError, UnavailableError
from tla_service.job import run_job
from tla_service.registry.evidence import verify
from tla_service.registry.job_settings import GateRules, PromoteSettings
from tla_service.registry.promotion import Decision, Promotion
from tla_service.tracking.runs import open_run

RULES = GateRules(min_clean_accuracy=0.9, min_autoattack_accuracy=0.5, min_detection_auc=0.7)
GOOD = fates(clean=390, autoattack=300)


def attempt(packaged: Packaged, version: str, rules: GateRules = RULES) -> Decision:
    return Promotion(packaged.config.tracking, "tla-digits", "champion", rules).promote(version)


def aliases(packaged: Packaged) -> dict[str, str]:
    return {name: str(at) for name, at in MlflowClient(packaged.uri).get_registered_model("tla-digits").aliases.items()}


def failed(decision: Decision) -> dict[str, str]:
    return {finding.rule: finding.explanation for finding in decision.findings if not finding.passed}


def records(packaged: Packaged) -> list[dict[str, str]]:
    """Tags of every recorded decision, the first one first."""
    made = MlflowClient(packaged.uri)
    experiment = made.get_experiment_by_name("tla-promotions").experiment_id
    return [run.data.tags for run in made.search_runs([experiment], order_by=["attributes.start_time ASC"])]


def test_a_good_version_is_promoted_and_the_decision_recorded(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    decision = attempt(packaged, "1")
    assert (decision.verdict, failed(decision)) == ("promoted", {})
    assert aliases(packaged) == {"champion": "1"}
    tags = MlflowClient(packaged.uri).get_model_version("tla-digits", "1").tags
    assert tags["tla.champion.decision"] == "promoted"
    rules = {finding["rule"]: finding["explanation"] for finding in json.loads(tags["tla.champion.findings"])}
    assert rules["clean accuracy"].startswith("98.0% (93.")
    (record,) = records(packaged)
    assert record["tla.promotion"] == "promoted"
    assert json.loads(record["tla.promotion.rules"])["min_clean_accuracy"] == 0.9
    assert attempt(packaged, "1").verdict == "unchanged"
    assert [record["tla.promotion"] for record in records(packaged)] == ["promoted", "unchanged"]


POOR: dict[str, tuple[dict[str, Any], str, str]] = {
    "clean": ({"outcome": fates(350, 300)}, "clean accuracy", "88.0%"),
    "autoattack": ({"outcome": fates(390, 190)}, "AutoAttack accuracy", "48.0%"),
    "few images": (
        {"outcome": fates(80, 80, images=80)},
        "images",
        "20 gate images; at least 100 required",
    ),
    "audit failed": ({"audit": {"trusted": False, "images": 100, "checks": []}}, "audit", "gradient masking failed"),
    "no audit": ({"audit": None}, "audit", "was not run"),
    "no detection": ({"gate": {"detection": None}}, "detection", "was not measured"),
}


@pytest.mark.parametrize(("changes", "rule", "words"), POOR.values(), ids=POOR.keys())
def test_a_poor_version_is_refused_with_the_reason(
    packaged: Packaged, changes: dict[str, Any], rule: str, words: str
) -> None:
    changes = {"outcome": GOOD} | changes
    outcome = changes.pop("outcome")
    if "gate" in changes:
        changes["gate"] = report_on("0" * 64, outcome).model_dump()["gate"] | changes["gate"]
    evaluate(packaged, "1", outcome, **changes)
    decision = attempt(packaged, "1")
    assert decision.verdict == "refused"
    assert set(failed(decision)) == {rule}
    assert words in failed(decision)[rule]
    assert aliases(packaged) == {}
    assert MlflowClient(packaged.uri).get_model_version("tla-digits", "1").tags["tla.champion.decision"] == "refused"


def test_an_unevaluated_version_is_refused_whatever_its_tags(packaged: Packaged) -> None:
    made = MlflowClient(packaged.uri)
    for name, value in {
        "tla.accuracy.clean": "1.0",
        "tla.accuracy.autoattack": "1.0",
        "tla.audit.trusted": "true",
    }.items():
        made.set_model_version_tag("tla-digits", "1", name, value)
    decision = attempt(packaged, "1")
    assert decision.verdict == "refused"
    assert "run jobs/evaluate_tla.py --model models:/tla-digits/1" in failed(decision)["version evaluated"]


def test_a_report_on_other_weights_is_refused(packaged: Packaged, tmp_path: Path) -> None:
    sha256 = MlflowClient(packaged.uri).get_model_version("tla-digits", "1").tags["weights_sha256"]
    evaluate(packaged, register_another(packaged), GOOD, log_as=sha256)
    assert "its report is about other weights" in failed(attempt(packaged, "1"))["version evaluated"]


def test_an_embellished_report_is_refused(packaged: Packaged) -> None:
    honest, better = report_on("0" * 64, fates(390, 8)), report_on("0" * 64, GOOD)
    evaluate(packaged, "1", fates(390, 8), accuracy=better.model_dump()["accuracy"])
    assert (
        "the report states 75.00% of 300, the per-image results 6 of 300" in failed(attempt(packaged, "1"))["figures"]
    )
    assert honest.gate is not None
    assert better.gate is not None
    embellished = honest.gate.model_copy(update={"accuracy": better.gate.accuracy})
    evaluate(packaged, "1", fates(390, 8), gate=embellished)
    assert "autoattack on gate images: the report states 75.00% of 100" in failed(attempt(packaged, "1"))["figures"]


def test_tampered_files_are_refused(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    location = MlflowClient(packaged.uri).get_model_version_download_uri("tla-digits", "1").removeprefix("file://")
    weights = Path(location) / "artifacts" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "weights.safetensors was modified" in failed(attempt(packaged, "1"))["version intact"]
    content[-1] ^= 1
    weights.write_bytes(content)
    (Path(location) / "extra.pkl").write_bytes(b"")
    assert "contains a file that was not packaged (extra.pkl)" in failed(attempt(packaged, "1"))["version intact"]


def test_a_foreign_model_is_refused(packaged: Packaged, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "MLmodel").write_text("flavors: {}")
    MlflowClient(packaged.uri).create_model_version("tla-digits", str(tmp_path / "foreign"), run_id=packaged.run_id)
    assert "was not registered by this project" in failed(attempt(packaged, "2"))["version intact"]


def test_a_promotion_that_ends_with_an_error_is_recorded_as_failed(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    with pytest.raises(ConfigError, match="alias=v1: MLflow refuses it"):
        Promotion(packaged.config.tracking, "tla-digits", "v1", RULES).promote("1")
    made = MlflowClient(packaged.uri)
    experiment = made.get_experiment_by_name("tla-promotions").experiment_id
    assert [run.info.status for run in made.search_runs([experiment])] == ["FAILED"]


def test_a_worse_version_does_not_replace_the_champion(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    second = register_another(packaged)
    evaluate(packaged, second, fates(clean=390, autoattack=280))
    assert attempt(packaged, "1").verdict == "promoted"
    decision = attempt(packaged, second)
    assert decision.verdict == "refused"
    assert set(failed(decision)) == {"autoattack not worse"}
    assert "-5.00 points" in failed(decision)["autoattack not worse"]
    assert "p = 0.062" in failed(decision)["autoattack not worse"]
    assert aliases(packaged) == {"champion": "1"}
    tolerant = RULES.model_copy(update={"not_worse": False})
    assert attempt(packaged, second, tolerant).verdict == "promoted"
    assert aliases(packaged) == {"champion": second, "previous": "1"}


def test_small_losses_are_refused_by_size_and_by_significance(packaged: Packaged) -> None:
    """One point on shuffled images is noise to a paired test, and more than may be lost."""
    evaluate(packaged, "1", fates(300, 250, shuffle=1))
    second = register_another(packaged)
    evaluate(packaged, second, fates(296, 250, shuffle=2))
    rules = GateRules(min_detection_auc=0.7)
    assert attempt(packaged, "1", rules).verdict == "promoted"
    assert set(failed(attempt(packaged, second, rules))) == {"clean not worse"}
    assert attempt(packaged, second, rules.model_copy(update={"max_drop": 0.02})).verdict == "promoted"
    third = register_another(packaged, 3.0)
    evaluate(packaged, third, fates(264, 250, shuffle=2))
    decision = attempt(packaged, third, rules.model_copy(update={"max_drop": 0.5}))
    assert "p = 0.0078" in failed(decision)["clean not worse"]
    assert decision.findings[-2].remedy.endswith("or change rules.significance")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data": {"name": "digits", "images": 400, "fingerprint": "beef", "class_names": []}},
            "data f00d instead of beef",
        ),
        ({"outcome": fates(300, 250, images=300)}, "different clean images"),
    ],
)
def test_only_what_was_measured_alike_is_compared(packaged: Packaged, changes: dict[str, Any], words: str) -> None:
    changes = {"outcome": GOOD} | changes
    evaluate(packaged, "1", changes.pop("outcome"), **changes)
    second = register_another(packaged)
    evaluate(packaged, second, GOOD)
    rules = RULES.model_copy(update={"min_images": 50})
    assert attempt(packaged, "1", rules).verdict == "promoted"
    assert words in failed(attempt(packaged, second, rules))["comparable"]


def test_a_champion_that_was_tampered_with_stops_the_gate(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    second = register_another(packaged)
    evaluate(packaged, second, GOOD)
    assert attempt(packaged, "1").verdict == "promoted"
    location = MlflowClient(packaged.uri).get_model_version_download_uri("tla-digits", "1").removeprefix("file://")
    (Path(location) / "MLmodel").write_text("flavors: {}")
    refused = attempt(packaged, second)
    assert set(failed(refused)) == {"champion intact"}
    shutil.rmtree(location)
    with pytest.raises(UnavailableError) as lost:
        attempt(packaged, second)
    *_, flag = refused.findings[-1].remedy.split()
    assert lost.value.remedy.endswith(refused.findings[-1].remedy)
    rules = read_settings(PromoteSettings, ["--model", "x", "--version", "1", flag]).rules
    assert attempt(packaged, second, RULES.model_copy(update={"not_worse": rules.not_worse})).verdict == "promoted"


def test_a_purged_run_is_no_evidence_and_its_champion_can_be_replaced(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    assert attempt(packaged, "1").verdict == "promoted"
    purged, packaged.run_id = packaged.run_id, open_run(packaged.config, "key-2", facts={})
    second = register_another(packaged)
    evaluate(packaged, second, GOOD)
    MlflowClient(packaged.uri).delete_run(purged)
    _get_store(packaged.uri)._hard_delete_run(purged)  # `mlflow gc`
    assert f"the run that trained it, {purged}, is gone" in failed(attempt(packaged, "1"))["version evaluated"]
    refused = attempt(packaged, second)
    assert set(failed(refused)) == {"champion evaluated"}
    assert refused.findings[-1].remedy == "to replace it without a comparison: --no-rules.not_worse"
    assert attempt(packaged, second, RULES.model_copy(update={"not_worse": False})).verdict == "promoted"


@pytest.mark.parametrize("file", ["weights.safetensors", "report.json"])
def test_an_artifact_store_that_is_away_is_no_refusal(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    evaluate(packaged, "1", GOOD)
    download = LocalArtifactRepository._download_file

    def lose(self: LocalArtifactRepository, remote_file_path: str, local_path: str) -> None:
        if remote_file_path.endswith(file):
            raise ConnectionError("reset by peer")
        download(self, remote_file_path, local_path)

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", lose)
    monkeypatch.setattr("tla_service.errors.time.sleep", lambda _: None)
    with pytest.raises(UnavailableError, match="failures occurred"):
        attempt(packaged, "1")
    assert "tla.champion.decision" not in MlflowClient(packaged.uri).get_model_version("tla-digits", "1").tags


def test_rollback_walks_back_through_the_champions(packaged: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = ["1", register_another(packaged), register_another(packaged, 3.0)]
    for place, version in enumerate(versions):
        evaluate(packaged, version, fates(clean=390, autoattack=300 + 4 * place))
        assert attempt(packaged, version).verdict == "promoted"
    assert aliases(packaged) == {"champion": "3", "previous": "2"}
    made, busy = MlflowClient(packaged.uri), [MlflowException("busy")]

    def examine(*arguments: Any) -> object:
        locks = made.search_registered_models("name LIKE 'tla-digits-champion-lock-%'")
        assert all("tla.lock.released" in each.tags for each in locks), "files are verified before the lock is taken"
        return verify(*arguments)

    def delete(self: MlflowClient, name: str, alias: str) -> None:
        if busy:
            raise busy.pop()
        delete_alias(self, name, alias)

    delete_alias = MlflowClient.delete_registered_model_alias
    monkeypatch.setattr(MlflowClient, "delete_registered_model_alias", delete)
    monkeypatch.setattr("tla_service.registry.promotion.verify", examine)
    decision = Promotion(packaged.config.tracking, "tla-digits", "champion", RULES).roll_back()
    assert (decision.verdict, decision.version, decision.replaced) == ("rolled back", "2", "3")
    assert aliases(packaged) == {"champion": "2", "previous": "1"}
    Promotion(packaged.config.tracking, "tla-digits", "champion", RULES).roll_back()
    assert aliases(packaged) == {"champion": "1"}
    with pytest.raises(ConfigError, match="no version carried 'champion' before"):
        Promotion(packaged.config.tracking, "tla-digits", "champion", RULES).roll_back()
    sequence = [int(record["tla.promotion.sequence"]) for record in records(packaged)]
    assert sequence == sorted(set(sequence))
    assert [record["tla.promotion"] for record in records(packaged)] == 3 * ["promoted"] + 2 * ["rolled back"]


def test_rollback_works_although_an_older_champion_was_deleted(packaged: Packaged) -> None:
    for version in ("1", register_another(packaged), register_another(packaged, 3.0)):
        evaluate(packaged, version, GOOD)
        assert attempt(packaged, version).verdict == "promoted"
    MlflowClient(packaged.uri).delete_model_version("tla-digits", "1")
    assert Promotion(packaged.config.tracking, "tla-digits", "champion", RULES).roll_back().version == "2"
    assert aliases(packaged) == {"champion": "2"}


def test_a_copy_does_not_roll_back_as_its_original_does(packaged: Packaged) -> None:
    made = MlflowClient(packaged.uri)
    for version in ("1", register_another(packaged)):
        evaluate(packaged, version, GOOD)
        assert attempt(packaged, version).verdict == "promoted"
    made.rename_registered_model("tla-digits", "renamed")
    for version in ("1", "2"):
        made.copy_model_version(f"models:/renamed/{version}", "copies")
    made.set_registered_model_alias("copies", "champion", "2")
    with pytest.raises(ConfigError, match="no version carried 'champion' before"):
        Promotion(packaged.config.tracking, "copies", "champion", RULES).roll_back()
    rules = RULES.model_copy(update={"not_worse": False})
    assert Promotion(packaged.config.tracking, "copies", "champion", rules).promote("1").replaced == "2"
    assert Promotion(packaged.config.tracking, "copies", "champion", RULES).roll_back().version == "2"
    assert set(made.get_registered_model("copies").aliases) == {"champion"}
    assert Promotion(packaged.config.tracking, "renamed", "champion", RULES).roll_back().version == "1"


def test_rollback_does_not_bring_back_what_was_changed(packaged: Packaged) -> None:
    evaluate(packaged, "1", GOOD)
    second = register_another(packaged)
    evaluate(packaged, second, GOOD)
    for version in ("1", second):
        attempt(packaged, version)
    location = MlflowClient(packaged.uri).get_model_version_download_uri("tla-digits", "1").removeprefix("file://")
    (Path(location) / "conda.yaml").write_text("")
    with pytest.raises(UnavailableError, match=r"conda\.yaml was modified"):
        Promotion(packaged.config.tracking, "tla-digits", "champion", RULES).roll_back()
    assert aliases(packaged)["champion"] == second


def test_the_job_explains_itself(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/promote_model.py", "--tracking.uri", packaged.uri, *arguments])
        code = run_job(promote_model.main)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    code, out, _ = job("--model", "tla-digits", "--version", "1")
    assert code == 4
    assert "REFUSED version evaluated" in out
    command = out.splitlines()[-1]
    assert command.startswith("next: ")
    assert command.endswith(f" jobs/evaluate_tla.py --model models:/tla-digits/1 --tracking.uri {packaged.uri}")
    packaged.log("my digits")
    code, out, _ = job("--model", "my digits", "--version", "1")
    assert (code, shlex.split(out.splitlines()[-1])[-3]) == (4, "models:/my digits/1")
    evaluate(packaged, "1", GOOD)
    code, out, _ = job("--model", "tla-digits", "--version", "1", "--rules.min_autoattack_accuracy", "0.9")
    assert (code, "REFUSED AutoAttack accuracy" in out) == (4, True)
    assert out.splitlines()[-1].startswith("next: train a better version, or change rules.min_autoattack")
    code, out, _ = job("--model", "tla-digits", "--version", "1")
    promoted, load = out.splitlines()[-2:]
    assert (code, promoted) == (0, "promoted: models:/tla-digits@champion is version 1")
    assert load == (
        f'next: mlflow.set_tracking_uri("{packaged.uri}"); mlflow.pyfunc.load_model("models:/tla-digits@champion")'
    )
    out = job("--model", "tla-digits", "--version", "1")[1]
    assert out.splitlines()[-2] == "unchanged: models:/tla-digits@champion is version 1"
    assert job("--model", "tla-digits", "--version", "9")[0] == 3
    assert job("--model", "nobody", "--version", "1")[0] == 3
    code, _, error = job("--model", "nobody", "--rollback")
    assert (code, error.count("\n"), error.startswith("error: model=nobody: ")) == (3, 1, True)
    names = [each.name for each in MlflowClient(packaged.uri).search_registered_models()]
    assert not any(name.startswith("nobody") for name in names)
    elsewhere = f"sqlite:///{tmp_path}/none.db"
    assert job("--model", "tla-digits", "--version", "1", "--tracking.uri", elsewhere)[0] == 3
    assert not (tmp_path / "none.db").exists()
    assert job("--model", "tla-digits", "--version", "1", "--rollback")[0] == 2
    assert job("--model", "tla-digits")[0] == 2
    code, _, error = job("--model", "tla-digits", "--version", "1", "--alias", "v3")
    assert (code, error.count("\n")) == (2, 1)
    code, _, error = job("--model", "tla-digits", "--version", "1", "--rules.max_drop", "3")
    assert (code, error.startswith("error: rules.max_drop=3: ")) == (2, True)


def test_the_same_command_completes_a_promotion_that_was_interrupted_between_its_aliases(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", register_another(packaged)):
        evaluate(packaged, version, GOOD)
    attempt(packaged, "1")
    right, calls = Promotion._set_alias, list[str]()

    def interrupted(promotion: Promotion, alias: str, version: str) -> None:
        calls.append(alias)
        if len(calls) == 2:
            raise KeyboardInterrupt
        right(promotion, alias, version)

    monkeypatch.setattr(Promotion, "_set_alias", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attempt(packaged, "2")
    assert attempt(packaged, "2").verdict == "promoted"
    assert aliases(packaged) == {"champion": "2", "previous": "1"}
