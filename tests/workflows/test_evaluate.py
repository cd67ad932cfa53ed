"""An evaluation is known by weights, data and protocol: under another address of the weights it is the same one."""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.registry.evaluations import fates, report_on
from tests.registry.tracking_server import Packaged
from tla_service.config import ModelConfig
from tla_service.errors import ConfigError, UnavailableError
from tla_service.evaluation.shards import save_outcome
from tla_service.job import run_job
from tla_service.registry.subject import load_subject
from tla_service.report.evaluate import evaluate, identity, open_folder, report_folder
from tla_service.report.loading import load_models
from tla_service.report.plan import make_plan
from tla_service.report.schema import OUTCOME_FILE, PAGE_FILE, REPORT_FILE, write_report
from tla_service.report.settings import EvaluateSettings
from tla_service.training.reporting import Terminal

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test; Ray, which starts in the background, is not waited for."""
    import ray

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))


@pytest.fixture(scope="module")
def packaged(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packaged]:
    """Version 1 of tla-digits, which is the champion; tests add to it what does not disturb others."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(template, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(folder)
        environment.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        made = Packaged(f"sqlite:///{folder / 'mlflow.db'}")
        MlflowClient(made.uri).set_registered_model_alias("tla-digits", "champion", "1")
        yield made


def prepared(packaged: Packaged, address: str, **changes: object) -> tuple[Path, dict[str, object]]:
    """Folder and identity of an evaluation."""
    settings = EvaluateSettings.model_validate({"model": address, "data": {"name": "digits"}, **changes})
    models = load_models(settings, lambda uri, field: load_subject(uri, field, packaged.uri))
    threat = models.subject.facts.trained_for
    plan = make_plan(settings, "digits", threat.norm, threat.epsilon, has_surrogate=False)
    return report_folder(models, plan), identity(models, plan)


def finished(folder: Path, mine: dict[str, object], **changes: object) -> None:
    """A finished report in the folder, with figures made up by the test."""
    outcome = fates(clean=90, autoattack=70, images=100)
    open_folder(folder, mine)
    accuracy = report_on("0" * 64, outcome).model_dump()["accuracy"]
    accuracy["worst"] = accuracy["autoattack"]
    attack = {
        "stages": ["square"],
        "left_out": {},
        "broken_by": {},
        "strongest": "x",
        "weak": False,
        "version": "standard",
    }
    gap = {"difference": 0, "low": 0, "high": 0, "p_value": 1, "images": 100}
    report = report_on(
        mine["weights"][0],  # type: ignore[index]
        outcome,
        accuracy=accuracy,
        autoattack=attack | {"gap": gap, "warnings": ["it seems odd"]},
        **changes,
    )
    write_report(report, folder / REPORT_FILE)
    save_outcome(outcome, folder / OUTCOME_FILE)
    (folder / PAGE_FILE).write_text("page")


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The job as a user runs it; what it prints."""
    from jobs import evaluate_tla

    monkeypatch.setattr(sys, "argv", ["evaluate_tla.py", "--data.name", "digits", *arguments])
    code = run_job(evaluate_tla.main)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def test_the_address_does_not_tell_evaluations_apart(packaged: Packaged) -> None:
    addresses = ["models:/tla-digits/1", "models:/tla-digits@champion", packaged.model.model_uri]
    found = [prepared(packaged, address) for address in addresses]
    assert found[1:] == found[:1] * 2
    folder, mine = found[0]
    assert folder == Path("reports").absolute() / mine["weights"][0][:12]  # type: ignore[index]
    # What is said anew is no other evaluation either.
    assert prepared(packaged, "models:/tla-digits/1", norm="linf", epsilon=0.15, log=False) == found[0]


def test_threat_models_have_folders_of_their_own(packaged: Packaged) -> None:
    plain, _ = prepared(packaged, "models:/tla-digits/1")
    l2, mine = prepared(packaged, "models:/tla-digits/1", norm="l2")
    small, _ = prepared(packaged, "models:/tla-digits/1", epsilon=0.1)
    assert [l2.name, small.name] == [f"{plain.name}-l2-0.6", f"{plain.name}-linf-0.1"]
    assert mine["threat model"] == "l2 0.6"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "settings"),
        ({"images": {"autoattack": 10}}, "settings"),
        ({"epsilon": 0.1}, "threat model, settings"),
        ({"data": {"name": "digits", "test_limit": 50}}, "data"),
    ],
)
def test_another_evaluation_is_refused_by_what_differs(
    packaged: Packaged, changes: dict[str, object], said: str
) -> None:
    folder, mine = prepared(packaged, "models:/tla-digits/1")
    assert not open_folder(folder, mine)
    assert not open_folder(folder, mine)  # half done: it goes on
    _, other = prepared(packaged, "models:/tla-digits/1", **changes)
    with pytest.raises(ConfigError, match=rf"differs in {said}; choose another --output"):
        open_folder(folder, other)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "null", "\xff"])
def test_a_damaged_identity_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text, encoding="latin-1")
    with pytest.raises(UnavailableError, match=r"cannot be used \(.*\); choose another --output"):
        open_folder(tmp_path, {"weights": []})


def test_the_same_weights_in_another_network_are_another_evaluation(packaged: Packaged) -> None:
    folder, mine = prepared(packaged, "models:/tla-digits/1")
    open_folder(folder, {name: value for name, value in mine.items() if name != "architecture"})
    assert not open_folder(folder, mine), "an earlier version did not state it"
    config = packaged.config.model_copy(update={"model": ModelConfig(normalization="per_image")})
    packaged.log("corrected", config=config)
    _, other = prepared(packaged, "models:/corrected/1")
    with pytest.raises(ConfigError, match="differs in architecture; choose another --output"):
        open_folder(folder, other)


def test_the_same_weights_in_another_surrogate_are_another_evaluation(packaged: Packaged) -> None:
    weights = {name: value + 1 for name, value in packaged.network.state_dict().items()}
    found = []
    for normalization in ("default", "per_image"):
        config = packaged.config.model_copy(update={"model": ModelConfig(normalization=normalization)})
        packaged.log(f"surrogate-{normalization}", config=config, state_dict=weights, rejector=None)
        surrogate = f"models:/surrogate-{normalization}/1"
        found.append(prepared(packaged, "models:/tla-digits/1", surrogate=surrogate, output=Path("surrogates")))
    (folder, mine), (_, other) = found
    open_folder(folder, {name: value for name, value in mine.items() if name != "architecture of the surrogate"})
    assert not open_folder(folder, mine), "an earlier version did not state it"
    with pytest.raises(ConfigError, match="differs in architecture of the surrogate; choose another --output"):
        open_folder(folder, other)


def test_the_same_weights_with_another_detector_are_another_evaluation(packaged: Packaged) -> None:
    _, with_own = prepared(packaged, "models:/tla-digits/1")
    packaged.log("without-detector", rejector=None)
    packaged.log("other-threshold", rejector=replace(packaged.rejector, threshold=1.0))
    folder, without = prepared(packaged, "models:/without-detector/1")
    _, other = prepared(packaged, "models:/other-threshold/1")
    for place, (first, second) in enumerate([(with_own, without), (without, with_own), (with_own, other)]):
        open_folder(folder / str(place), first)
        with pytest.raises(ConfigError, match="differs in detector; choose another --output"):
            open_folder(folder / str(place), second)


def test_a_detector_of_gigabytes_is_refused_before_anything_is_measured(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tla_service.evaluation.detection._LARGEST_BYTES", 10**4)
    chosen = {"model": "models:/tla-digits/1", "data": {"name": "digits"}, "output": tmp_path / "report"}
    settings = EvaluateSettings.model_validate(chosen)
    models = load_models(settings, lambda uri, field: load_subject(uri, field, packaged.uri))
    with pytest.raises(
        ConfigError, match=r"detection\.covariance=full: 10 classes with .* need a detector of .*; use tied"
    ):
        evaluate(settings, models, lambda: pytest.fail("workers were started"), Terminal(io.StringIO()))
    assert not (tmp_path / "report").exists()


def test_a_surrogate_is_compared_where_it_is_used(packaged: Packaged, tmp_path: Path) -> None:
    for audit in (0, 100):
        folder, mine = prepared(packaged, "models:/tla-digits/1", output=tmp_path / str(audit), images={"audit": audit})
        open_folder(folder, mine | {"surrogate": "5" * 64})
        with pytest.raises(ConfigError, match="differs in surrogate") if audit else contextlib.nullcontext():
            open_folder(folder, mine)


def test_an_own_attack_with_other_code_is_another_evaluation(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "attack_of_this_test.py"
    code.write_text("def stay(logits_fn, images, labels, attack, generator):\n    return images\n")
    monkeypatch.syspath_prepend(tmp_path)
    attacks = {"pgd": {"num_steps": 20}, "own": {"kind": "attack_of_this_test:stay"}}
    chosen = {"output": tmp_path / "report", "attacks": attacks}
    folder, mine = prepared(packaged, "models:/tla-digits/1", **chosen)
    open_folder(folder, {name: value for name, value in mine.items() if name != "code of attacks"})
    assert not open_folder(folder, mine), "an earlier version did not state it"
    code.write_text(code.read_text().replace("return images", "return 1 - images"))
    _, other = prepared(packaged, "models:/tla-digits/1", **chosen)
    with pytest.raises(ConfigError, match="differs in code of attacks; choose another --output"):
        open_folder(folder, other)
    assert "code of attacks" not in prepared(packaged, "models:/tla-digits/1")[1]


def test_a_finished_evaluation_is_logged_for_another_address(
    packaged: Packaged, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mine = prepared(packaged, "models:/tla-digits/1")
    finished(folder, mine)
    uri = f"--tracking.uri={packaged.uri}"
    printed = run(capsys, monkeypatch, "--model", "models:/tla-digits@champion", uri)
    assert "has finished before" in printed
    assert "tagged tla-digits/1" in printed
    assert "AutoAttack warns: it seems odd" in printed
    next_line = printed.splitlines()[-1]
    assert next_line.startswith("next: ")
    assert "promote_model.py --model tla-digits --version 1" in next_line
    assert packaged.uri in next_line
    assert packaged.run_id in MlflowClient(packaged.uri).get_model_version("tla-digits", "1").description


def test_a_model_of_a_deleted_run_is_refused_before_it_is_measured(
    packaged: Packaged, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import evaluate_tla

    made = MlflowClient(packaged.uri)
    made.delete_run(packaged.run_id)
    arguments = ["--data.name", "digits", "--model", "models:/tla-digits/1", f"--tracking.uri={packaged.uri}"]
    monkeypatch.setattr(sys, "argv", ["evaluate_tla.py", *arguments])
    try:
        assert run_job(evaluate_tla.main) == 3
    finally:
        made.restore_run(packaged.run_id)
    said = f"error: model=models:/tla-digits/1: the run that trained it, {packaged.run_id}, is deleted; restore it"
    told = capsys.readouterr().err
    assert said in told
    assert told.endswith("or give --no-log\n")


def test_what_cannot_be_promoted_is_to_be_read(
    packaged: Packaged, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mine = prepared(packaged, "models:/tla-digits/1")
    check = {"figure": 0.5, "threshold": 0.1, "statement": "s", "meaning": "m"}
    checks = [{"name": n, "outcome": o, **check} for n, o in [("a", "passed"), ("b", "failed"), ("c", "not run")]]
    finished(folder, mine, audit={"trusted": False, "images": 9, "checks": checks})
    uri = f"--tracking.uri={packaged.uri}"
    printed = run(capsys, monkeypatch, "--model", "models:/tla-digits/1", uri)
    assert "audit: NOT trusted, 1 of 3 checks passed, 1 failed (b), 1 not run (c)" in printed
    assert printed.splitlines()[-1] == f"next: open {folder / PAGE_FILE}"
    assert json.loads((folder / REPORT_FILE).read_text())["model"]["uri"] == "models:/x/1"
