"""A run with the user's own network of two files: its checkpoints have the code, and belong to it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.test_own_code import OWN
from tests.training.conftest import digits_config
from tests.training.test_resume import train
from tla_service.config import RunConfig
from tla_service.errors import ConfigError
from tla_service.job import run_job
from tla_service.models import Architecture
from tla_service.registry.loading import load_model
from tla_service.report.subjects import load_checkpoint_subject
from tla_service.training.__main__ import main


def config_with(code: Path, **changes: object) -> RunConfig:
    return digits_config(model={"name": "network:build", "code": str(code), **changes})


def newest(output: Path) -> Path:
    return max((output / "checkpoints").glob("step-*"))


@pytest.fixture
def code(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OWN, tmp_path / "code"))


def test_a_moved_folder_resumes_to_identical_weights_and_a_changed_one_is_refused(tmp_path: Path, code: Path) -> None:
    train(tmp_path / "whole", config_with(code))
    train(tmp_path / "run", config_with(code), epochs=2)
    moved = code.rename(tmp_path / "moved")
    original = (moved / "network.py").read_text()
    (moved / "network.py").write_text(original + "# changed\n")
    with pytest.raises(ConfigError, match="this run began with; bring them back, or choose another --name or --output"):
        train(tmp_path / "run", config_with(moved))
    (moved / "network.py").write_text(original)
    train(tmp_path / "run", config_with(moved))
    whole, resumed = (load_file(newest(tmp_path / name) / "best.safetensors") for name in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_checkpoint_loads_where_the_folder_is_gone(tmp_path: Path, code: Path) -> None:
    run = train(tmp_path / "run", config_with(code, embedding="blocks.0"), epochs=1)
    shutil.rmtree(code)
    images = torch.rand(3, 1, 8, 8)
    expected = run.state.network.eval()(images)
    loaded = load_model(str(newest(tmp_path / "run")))
    subject = load_checkpoint_subject(str(newest(tmp_path / "run")), "model").network
    for network in (loaded, subject):
        assert torch.equal(network(images).logits, expected.logits)
        assert torch.equal(network(images).embeddings, expected.embeddings)
        assert network(images).embeddings.shape == (3, 16)


def test_a_worker_without_the_folder_builds_from_the_archive(tmp_path: Path, code: Path) -> None:
    config = config_with(code)
    archive = Architecture.of(config.model).code
    shutil.rmtree(code)
    run = train(tmp_path / "run", config, epochs=1, code=archive)
    assert run.state.network.embedding_size == 32


def test_the_log_says_once_where_the_embedding_is(tmp_path: Path, code: Path) -> None:
    train(tmp_path / "run", config_with(code), epochs=1)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert log.count("embedding: input of head, 32 numbers") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--model.name", "network:other"), 2, "error: model.name=network:other: network has no function other"),
        (
            ("--model.name", "missing:build"),
            3,
            "error: model.name=missing:build: the module missing is not in the folder",
        ),
        (("--model.code", "/not/there"), 3, "error: model.code=/not/there: there is no such folder"),
        (("--model.embedding", "layer4"), 2, "error: model.embedding=layer4: no layer of this name"),
        (("--model.name", "digits_cnn"), 2, "loss term or miner is; leave it out, or name one of its functions"),
        (("--model.name", "argmax:build"), 2, "its logits are not the output of a linear layer"),
        (("--model.name", "argmax:build", "--model.embedding", "0"), 2, "no gradient with respect to the images"),
    ],
)
def test_one_line_before_training(
    tmp_path: Path,
    code: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    text = "from torch import nn\nclass Hard(nn.Module):\n    def forward(self, x):\n"
    text += "        return nn.functional.one_hot(x.argmax(1), 10).float()\n"
    text += "def build(k, s):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, k), Hard())\n"
    (code / "argmax.py").write_text(text)
    command = ["training", "--preset", "digits", "--output", str(tmp_path / "run")]
    command += ["--model.name", "network:build", "--model.code", str(code), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    ended = run_job(main)
    error = capsys.readouterr().err
    assert (ended, error.count("\n")) == (status, 1), error
    assert said in error
    assert not (tmp_path / "run" / "checkpoints").exists()
