"""Weights of others: the published networks' names, wrappers, and what must not be let in."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from jobs import import_model as job
from tla_service.errors import ConfigError, UnavailableError
from tla_service.job import run_job
from tla_service.models import build_model
from tla_service.models.wide_resnet import WideResNet
from tla_service.registry import load_model
from tla_service.registry.importing import fitted_state_dict, read_state_dict


def robustbench(name: str) -> ModuleType:
    """A file of RobustBench's architectures; the package around it wants more than is installed."""
    found = importlib.util.find_spec("robustbench")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs robustbench")
    path = Path(found.submodule_search_locations[0], "model_zoo", "architectures", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"robustbench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lively(network: torch.nn.Module) -> torch.nn.Module:
    """With statistics of BatchNorm that are not those of a fresh network."""
    random = torch.Generator().manual_seed(1)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=random) + (0.5 if name.endswith("var") else 0))
    return network.eval()


def test_a_wide_resnet_of_robustbench_and_trades() -> None:
    theirs = lively(robustbench("wide_resnet").WideResNet(depth=10, widen_factor=2, sub_block1=True))
    ours = WideResNet(10, 2, num_classes=10, in_channels=3, normalization=torch.nn.Identity()).eval()
    wrapped = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    assert any("sub_block1" in name for name in wrapped)
    ours.load_state_dict(fitted_state_dict(wrapped, ours, "x"))
    batch = torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(batch).logits, theirs(batch), atol=1e-5, rtol=1e-5)


def test_a_preact_resnet_of_robustbench() -> None:
    """As Rice2020Overfitting's there."""
    module = robustbench("resnet")
    theirs = lively(module.PreActResNet(module.PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True, out_shortcut=True))
    ours = build_model("preact_resnet_18", 10, (3, 32, 32), "none").eval()
    ours.load_state_dict(fitted_state_dict(theirs.state_dict(), ours, "x"))
    batch = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(batch).logits, theirs(batch), atol=1e-4, rtol=1e-4)


def test_a_normalisation_that_is_stored_must_be_the_networks() -> None:
    ours = build_model("preact_resnet_18", 10, (3, 32, 32), "cifar10")
    statistics = {
        "mu": torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1),
        "sigma": torch.tensor([0.2471, 0.2435, 0.2616]),
    }
    fitted_state_dict({**ours.state_dict(), **statistics}, ours, "x")
    statistics["sigma"] = torch.tensor([0.2, 0.2, 0.2])
    with pytest.raises(ConfigError, match=r"sigma = \[0\.2, 0\.2, 0\.2\], that is not the network's"):
        fitted_state_dict({**ours.state_dict(), **statistics}, ours, "x")
    bare = build_model("preact_resnet_18", 10, (3, 32, 32), "none")
    with pytest.raises(ConfigError, match="carry a normalisation"):
        fitted_state_dict({**bare.state_dict(), **statistics}, bare, "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop("fc.bias"), r"fc\.bias is missing\)"),
        (lambda found: found.update(extra=torch.zeros(1)), r"extra has no place\)"),
        (lambda found: found.update({"fc.bias": torch.zeros(3)}), r"fc\.bias is \(3,\), not \(10,\)\)"),
    ],
)
def test_weights_of_another_network(change: Any, words: str) -> None:
    network = build_model("digits_cnn", 10, (1, 8, 8))
    found = dict(network.state_dict())
    change(found)
    with pytest.raises(ConfigError, match=words):
        fitted_state_dict(found, network, "x")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the file ran code')",)


def test_files_of_every_kind(tmp_path: Path) -> None:
    weights = build_model("digits_cnn", 10, (1, 8, 8)).state_dict()
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "c.pth")
    torch.save({"model": {"net": weights}}, tmp_path / "d.pt")
    for name in ("a.safetensors", "b.pt", "c.pth", "d.pt"):
        assert set(read_state_dict(tmp_path / name)) == set(weights)
    torch.save({"state_dict": weights, "args": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UnavailableError, match="holds more than weights, and loading it would run code"):
        read_state_dict(tmp_path / "evil.pt")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    (tmp_path / "cut.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:100])
    for name in ("cut.safetensors", "cut.pt"):
        with pytest.raises(UnavailableError, match="file="):
            read_state_dict(tmp_path / name)
    with pytest.raises(UnavailableError, match="there is no such file"):
        read_state_dict(tmp_path / "none.pt")


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
    assert "models:/tla-digits/1: clean accuracy" in capsys.readouterr().out
    assert call("--file", str(tmp_path / "w.pt"), "--epsilon", "0.1") == 0, "again: the same version"
    versions = MlflowClient(local_uri).search_model_versions("name='tla-digits'")
    assert [(version.version, version.tags["method"]) for version in versions] == [(1, "imported")]
    batch = torch.from_numpy(np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32))
    with torch.inference_mode():
        assert torch.equal(load_model("models:/tla-digits/1", tracking=local_uri)(batch).logits, network(batch).logits)
    assert call("--file", str(tmp_path / "w.pt"), "--model.name", "mnist_mlp") == 2
    assert call("--file", str(tmp_path / "nothing.pt")) == 3
    assert call() == 2
