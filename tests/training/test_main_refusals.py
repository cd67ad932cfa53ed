"""What `python -m tla_service.training` refuses before the first step."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tla_service.job import run_job
from tla_service.models import build_model
from tla_service.training import __main__ as job
from tla_service.training.checkpoint import MANIFEST

QUICK = ("--preset", "digits", "--training.max_steps", "1", "--data.train_limit", "100", "--data.test_limit", "10")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["training", *QUICK, "--output", str(tmp_path / "out"), *arguments])
        code = run_job(job.main)
        return code, capsys.readouterr().err

    return call


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(run: Any) -> None:
    code, error = run("--scaling.use_gpu", "true")
    assert (code, error.count("\n")) == (3, 1)
    assert "scaling.use_gpu=True: torch sees no GPU here" in error


def test_a_disk_without_room(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: true(path)._replace(free=1000))
    code, error = run()
    assert code == 3
    assert f"output={tmp_path}/out/checkpoints: its disk has 1e-06 GB free, the run needs 0.00" in error
    assert not (tmp_path / "out" / "config.yaml").exists(), "the folder is not this run's yet"


def test_weights_of_another_network(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(build_model("digits_cnn", 4, (1, 8, 8)).state_dict(), folder / "best.safetensors")
    (folder / MANIFEST).write_text("{}")
    code, error = run("--model.weights", str(folder))
    assert (code, error.count("\n")) == (2, 1)
    assert f"model.weights={folder}: are not of a digits_cnn with 10 classes; set model.name" in error


def test_a_step_with_one_image(run: Any) -> None:
    code, error = run(
        "--model.name", "torchvision:resnet18", "--method", "at", "--training.global_batch_size", "2",
        "--data.train_limit", "102",
    )  # fmt: skip
    assert (code, error.count("\n")) == (2, 1)
    assert "91 training images in 46 steps leave it with one image in some step" in error
