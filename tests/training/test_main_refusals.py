"""What `python -m tla_service.training` refuses before the first step."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tla_service.config import DataConfig
from tla_service.data import load_dataset
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


def test_pretrained_weights_that_do_not_fit(run: Any, tmp_path: Path) -> None:
    folder, file = tmp_path / "weights", tmp_path / "w.safetensors"
    folder.mkdir()
    save_file(build_model("digits_cnn", 4, (1, 8, 8)).state_dict(), folder / "best.safetensors")
    (folder / MANIFEST).write_text("{}")
    save_file(build_model("mnist_mlp", 10, (1, 8, 8)).state_dict(), file)
    (tmp_path / "page.pt").write_text("<html>")
    for code, source, words, *others in (
        (2, folder, "its head has 4 classes, the data has 10; set model.head to new"),
        (2, file, "does not match this network (convolutions.0.weight is missing and"),
        (3, tmp_path / "page.pt", "a web page, not weights; download the file"),
        (3, tmp_path, "no best.safetensors in it"),
        (3, tmp_path / "nowhere", "there is no such file or folder; give a file"),
        (2, "models:/digits/1", "an address of MLflow, which is not used here; give a file"),
        (2, "torchvision", "torchvision has no weights of digits_cnn; use a network of torchvision"),
        (2, folder, "digits_cnn has no BatchNorm", "--model.head", "new", "--training.freeze_batchnorm"),
    ):
        found, error = run("--model.pretrained", str(source), *others)
        assert (found, error.count("\n")) == (code, 1), error
        assert words in error
        assert error.startswith("error: training.freeze_batchnorm" if others else f"error: model.pretrained={source}: ")


def test_a_step_with_one_image(run: Any) -> None:
    code, error = run(
        "--model.name", "torchvision:resnet18", "--method", "at", "--training.global_batch_size", "2",
        "--data.train_limit", "102",
    )  # fmt: skip
    assert (code, error.count("\n")) == (2, 1)
    assert "91 training images in 46 steps leave it with one image in some step" in error


def test_extra_images_that_leak(run: Any, tmp_path: Path) -> None:
    images = load_dataset(DataConfig()).test.fetch(torch.tensor([440]))[:, 0].numpy()
    np.savez(tmp_path / "extra.npz", image=images, label=[0])
    code, error = run(
        "--data.extra.path", str(tmp_path / "extra.npz"), "--data.extra.share", "0.5", "--data.cache_dir", str(tmp_path)
    )  # fmt: skip
    assert (code, error.count("\n")) == (2, 1)
    assert f"data.extra.path={tmp_path}/extra.npz: 1 of its 1 images are near-duplicates" in error
    assert "row 0 = test image 440 (distance 0.00" in error
