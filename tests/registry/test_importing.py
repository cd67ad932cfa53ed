"""The job that registers weights of others: it predicts the same, and is refused before anything is measured."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from jobs import import_model as job
from tla_service.job import run_job
from tla_service.models import build_model
from tla_service.registry.loading import load_model
from tla_service.registry.subject import load_subject


def test_the_job_registers_what_predicts_the_same(
    local_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build_model("digits_cnn", 10, (1, 8, 8)).eval()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, tmp_path / "w.pt"
    )

    def call(*arguments: str) -> int:
        shared = ["--tracking.uri", local_uri, "--data.train_limit", "200", "--data.test_limit", "50"]
        monkeypatch.setattr(sys, "argv", ["import_model.py", *shared, *arguments])
        return run_job(job.main)

    assert call("--file", str(tmp_path / "w.pt"), "--epsilon", "0.1", "--source", "a paper") == 0
    *_, told, following = capsys.readouterr().out.splitlines()
    assert told.startswith("models:/tla-digits/1: clean accuracy")
    assert following.startswith("next: ")
    assert following.endswith(f"evaluate_tla.py --model models:/tla-digits/1 --tracking.uri {local_uri}")
    assert call("--file", str(tmp_path / "w.pt"), "--epsilon", "0.1") == 0, "again: the same version"
    versions = MlflowClient(local_uri).search_model_versions("name='tla-digits'")
    assert [(version.version, version.tags["method"]) for version in versions] == [(1, "imported")]
    batch = torch.from_numpy(np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32))
    with torch.inference_mode():
        assert torch.equal(load_model("models:/tla-digits/1", tracking=local_uri)(batch).logits, network(batch).logits)
    read = load_subject("models:/tla-digits/1", "model", local_uri).config
    assert read is not None
    assert (read.data.name, read.data.test_limit) == ("digits", 50), "an evaluation finds its data"
    # Weights do not tell a normalization or a detector.
    for corrected in (["--model.normalization", "per_image"], ["--detection.false_rejection_rate", "0.2"]):
        capsys.readouterr()
        assert call("--file", str(tmp_path / "w.pt"), "--epsilon", "0.1", *corrected) == 0
        assert "models:/tla-digits/1:" not in capsys.readouterr().out
    assert call("--file", str(tmp_path / "w.pt"), "--model.name", "mnist_mlp") == 2
    monkeypatch.setattr("tla_service.registry.importing.measure_accuracy", lambda *_: pytest.fail("measured"))
    for arguments in (
        ["--name", "team/digits"],
        ["--data.test_limit", "1"],
        ["--attack.norm", "l2"],
        ["--norm", "l2", "--epsilon", "128"],
        ["--epsilon", "8"],
        ["--model.pretrained", "other.pt"],
        ["--model.head", "new"],
        ["--model.code", "."],
        ["--data.extra.path", "extra.npz"],
    ):
        assert call("--file", str(tmp_path / "w.pt"), *arguments) == 2, arguments
    assert call("--file", str(tmp_path / "w.pt"), "--tracking.uri", "http://127.0.0.1:1") == 3
    assert call("--file", str(tmp_path / "nothing.pt")) == 3
    assert call() == 2
