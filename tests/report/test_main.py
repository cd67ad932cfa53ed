"""Evaluation of checkpoint folders on one machine, without Ray and MLflow."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.jobs.test_evaluate_refusals import checkpoint
from tla_service.evaluation.shards import Shard, load_outcome
from tla_service.evaluation.suite import AttackMeasurement
from tla_service.job import INTERRUPTED, run_job
from tla_service.report.__main__ import main
from tla_service.report.schema import read_report

pytestmark = pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")

Run = Callable[..., tuple[int, str, str]]
QUICK = [
    "--data.test_limit", "40", "--batch_size", "10", "--attacks", '{"pgd3": {"num_steps": 3, "num_restarts": 2}}',
    "--images.autoattack", "0", "--images.curves", "0", "--images.sparse", "0", "--images.certified", "0",
    "--images.audit", "0", "--images.corruptions", "0", "--images.representation", "0", "--images.transfer", "0",
    "--no-page",
]  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Evaluates a few images; gives exit code, output and messages."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["report", *QUICK, *arguments])
        code = run_job(main)
        return code, *capsys.readouterr()

    return call


def test_an_own_attack_that_does_not_fit_is_refused_before_anything_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = "def {name}(logits_fn, images, labels, attack, generator):\n    return {returned}\n\n\n"
    cases = {
        "fails": ("images / missing", "fails on 8 training images (NameError: name 'missing' is not defined); correct"),
        "leaves": ("images + 2 * attack.epsilon", "returned pixels in ["),
        "shape": ("images[:1]", "returned (1, 1, 8, 8) for images (8, 1, 8, 8)"),
    }
    (tmp_path / "unfit_attacks.py").write_text("".join(code.format(name=n, returned=r) for n, (r, _) in cases.items()))
    model = checkpoint(tmp_path / "model")
    for name, (_, said) in cases.items():
        attacks = f'{{"pgd": {{}}, "own": {{"kind": "unfit_attacks:{name}"}}}}'
        exit_code, _, message = run("--model", model, "--output", str(tmp_path / "out"), "--attacks", attacks)
        assert (exit_code, message.count("\n")) == (2, 1), message
        assert message.startswith(f"error: attacks.own.kind=unfit_attacks:{name}: {said}"), message
        assert not (tmp_path / "out").exists()


def test_an_interrupted_evaluation_resumes_from_its_shards(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = checkpoint(tmp_path / "model"), checkpoint(tmp_path / "other")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, printed, _ = run("--model", model, "--compare", other, "--output", str(whole))
    assert code == 0
    assert printed.splitlines()[-1] == f"report  {whole}/report.json"

    measured: list[list[int]] = []
    real = AttackMeasurement.run

    def count(self: AttackMeasurement, shard: Shard) -> Any:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(shard.rows.tolist())
        return real(self, shard)

    monkeypatch.setattr(AttackMeasurement, "run", count)
    assert run("--model", model, "--compare", other, "--output", str(cut))[0] == INTERRUPTED
    saved = {path: path.stat().st_mtime_ns for path in cut.glob("shards/*/*.npz")}
    assert len(saved) == 3
    damaged = next(iter(saved))
    damaged.write_bytes(damaged.read_bytes()[:50])
    monkeypatch.setattr(AttackMeasurement, "run", real)
    code, printed, _ = run("--model", model, "--compare", other, "--output", str(cut))
    assert code == 0
    assert "6 shards to measure, 2 taken from before" in printed
    assert {path.stat().st_mtime_ns for path in saved if path != damaged} < set(saved.values())

    one, two = read_report(whole / "report.json"), read_report(cut / "report.json")
    changes = {"seconds": 0.0}
    assert one.model_copy(update=changes) == two.model_copy(update=changes)
    before, after = load_outcome(whole / "outcome.npz"), load_outcome(cut / "outcome.npz")
    assert {k: v.tolist() for k, v in before.broken_at.items()} == {k: v.tolist() for k, v in after.broken_at.items()}
    assert "has finished before" in run("--model", model, "--compare", other, "--output", str(cut))[1]
    # The page belongs to another request: only then is it missing.
    assert not (cut / "report.html").exists()


@pytest.mark.slow
def test_the_detector_is_attacked_and_another_images_threshold_is_used(run: Run, tmp_path: Path) -> None:
    model, output = checkpoint(tmp_path / "model"), tmp_path / "report"
    code, _, message = run("--model", model, "--output", str(output), "--images.representation", "40")
    assert code == 0, message
    report = read_report(output / "report.json")
    for detection, images in ((report.detection, 30), (report.gate.detection, 10)):
        assert detection is not None
        assert detection.adaptive is not None
        assert (detection.adaptive.images, detection.adaptive.threshold_from) == (images, "validation")
        assert detection.adaptive.epsilon == report.threat_model.epsilon
    names = {path.name.partition("-")[0] for path in output.glob("shards/*/*.npz")}
    assert {"evasion", "rejection", "validation", "bank"} <= names
    code, _, _ = run("--model", model, "--output", str(tmp_path / "none"), "--images.adaptive", "0",
                     "--images.representation", "40")  # fmt: skip
    found = read_report(tmp_path / "none" / "report.json").detection
    assert code == 0
    assert found is not None
    assert found.adaptive is None


def test_a_collapsed_network_is_evaluated_and_its_report_says_why_there_is_no_detection(
    run: Run, tmp_path: Path
) -> None:
    model, output = Path(checkpoint(tmp_path / "model")), tmp_path / "report"
    weights = load_file(model / "best.safetensors")
    for name in ("hidden.weight", "hidden.bias"):
        weights[name].zero_()
    save_file(weights, model / "best.safetensors")
    code, _, message = run("--model", str(model), "--output", str(output), "--images.representation", "40", "--page")
    assert code == 0, message
    report = read_report(output / "report.json")
    for detection, rows in ((report.detection, 60), (report.gate.detection, 20)):
        assert detection is not None
        assert (detection.auc, detection.num_correct + detection.num_wrong) == (None, rows)
        assert detection.reason.endswith("training embeddings do not vary within any class")
    assert report.detection.reason in (output / "report.html").read_text()
    assert not list(output.glob("shards/evasion*"))


def test_addresses_that_name_no_checkpoint(run: Run, tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path / "model"))
    code, _, message = run("--model", "models:/tla-digits/1")
    assert (code, message.count("\n")) == (2, 1)
    assert "model=models:/tla-digits/1: an address of MLflow" in message
    (tmp_path / "empty").mkdir()
    for address, said in [
        ("nowhere", "there is no such folder"),
        (str(tmp_path / "empty"), "holds no best.safetensors"),
    ]:
        code, _, message = run("--model", address)
        assert (code, message.count("\n")) == (3, 1), message
        assert f"model={address}: {said}" in message
    (folder / "best.safetensors").write_bytes(b"cut off")
    code, _, message = run("--model", str(folder))
    assert code == 3
    assert "the weights are not those of digits_cnn" in message
    (folder / "data.json").unlink()
    code, _, message = run("--model", str(folder))
    assert code == 3
    assert "the checkpoint is incomplete: data.json is missing" in message


def test_settings_of_the_cluster_are_not_taken(run: Run, tmp_path: Path) -> None:
    code, _, message = run("--model", checkpoint(tmp_path / "model"), "--scaling.num_workers", "2")
    assert code == 2
    assert "scaling.num_workers" in message
