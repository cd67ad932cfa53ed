"""What a training job checks first, and how it ends: with the command that evaluates its model."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tla_service.config.loading import load_config
from tla_service.data import load_dataset
from tla_service.errors import ConfigError, UserError
from tla_service.training.local import train
from tla_service.training.reporting import Terminal
from tla_service.workflows.run import check_before_start, show_end
from tla_service.workflows.train import train_and_register

SUMMARY: dict[str, Any] = {
    "clean_accuracy": 0.9, "robust_accuracy": {"worst": 0.8}, "run_id": "r", "checkpoint": "c",
    "wall_seconds": {"train": 1.0},
}  # fmt: skip


def last_line(model_uri: str, tracking_uri: str) -> str:
    printed = io.StringIO()
    show_end(SUMMARY | {"model_uri": model_uri, "tracking_uri": tracking_uri}, Terminal(printed))
    return printed.getvalue().splitlines()[-1]


def test_the_last_line_evaluates_the_model_wherever_it_is_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = f"sqlite:///{tmp_path}/mlflow.db"
    assert last_line("models:/tla-digits/3", here).endswith("evaluate_tla.py --model models:/tla-digits/3")
    # Not registered: MLflow has it all the same.
    assert last_line("models:/m-0123", here).endswith("evaluate_tla.py --model models:/m-0123")
    server = "http://mlflow:5000"
    told = last_line("models:/tla-digits/3", server)
    assert told.endswith(f"evaluate_tla.py --model models:/tla-digits/3 --tracking.uri {server}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert last_line("models:/tla-digits/3", server).endswith("evaluate_tla.py --model models:/tla-digits/3")


@pytest.mark.parametrize(
    "model", [{"name": "digit_cnn"}, {"name": "a:b", "code": "~nosuchuser"}, {"pretrained": "~nosuchuser"}], ids=str
)
def test_typos_are_refused_before_the_data_is_read(tmp_path: Path, model: dict[str, str]) -> None:
    config = load_config(model=model, data={"name": "mnist", "root": "s3://there-is-no-bucket/mnist"})
    with pytest.raises(UserError, match=r"^model\."):
        check_before_start(config)
    with pytest.raises(UserError, match=r"^model\."):
        train(config, tmp_path)


def test_the_folder_of_a_run_without_tracking_is_refused(tmp_path: Path) -> None:
    """Both have the same folder by default, and its summary names no model."""
    config = load_config("digits", training={"max_steps": 1}, data={"train_limit": 100, "test_limit": 20})
    train(config, tmp_path)
    with pytest.raises(ConfigError, match=r"^output=.*: holds a run of python -m tla_service\.training"):
        train_and_register(config, tmp_path)


def test_the_end_shows_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A summary of an earlier version may contain them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    printed = io.StringIO()
    facts = {"model_uri": "models:/tla-digits/3", "tracking_uri": "http://me:hunter2@mlflow:5000"}
    show_end(SUMMARY | facts, Terminal(printed))
    assert "tracking   http://mlflow:5000  run" in printed.getvalue()
    assert printed.getvalue().endswith("--tracking.uri http://mlflow:5000\n")
    assert "hunter2" not in printed.getvalue()


def test_extra_images_are_checked_before_the_job_starts_and_are_among_its_facts(tmp_path: Path) -> None:
    path = tmp_path / "extra.npz"
    extra = {"path": str(path), "share": 0.5}
    config = load_config("digits", data={"extra": extra, "cache_dir": str(tmp_path)})
    noise = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    np.savez(path, image=noise, label=np.arange(30) % 10)
    facts = check_before_start(config).described
    assert (facts["training_images"], facts["validation_images"]) == ("1212", "135")  # as in a run's summary
    assert (facts["extra_images"], facts["extra_duplicates_left_out"]) == ("30", "0")
    assert len(facts["extra_fingerprint"]) == 16

    leaking = np.concatenate([noise, load_dataset(config.data).test.fetch(torch.tensor([7]))[:, 0].numpy()])
    np.savez(path, image=leaking, label=np.arange(31) % 10)
    with pytest.raises(ConfigError, match="row 30 = test image 7"):
        check_before_start(config)
