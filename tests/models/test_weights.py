"""Files of weights as others publish them: names, wrappers, copies, and what must not be let in."""

import importlib.util
import json
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.models import build_model
from tla_service.models.resnets import WideResNet
from tla_service.models.weights import fit, read_entries

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


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


def fitted(weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    return fit({"": weights}, network, "x").state_dict


def test_a_wide_resnet_of_robustbench_and_trades() -> None:
    theirs = lively(robustbench("wide_resnet").WideResNet(depth=10, widen_factor=2, sub_block1=True))
    ours = WideResNet(10, 2, num_classes=10, in_channels=3, normalization=torch.nn.Identity()).eval()
    wrapped = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    assert any("sub_block1" in name for name in wrapped)
    ours.load_state_dict(fitted(wrapped, ours))
    batch = torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(batch).logits, theirs(batch), atol=1e-5, rtol=1e-5)


def test_a_preact_resnet_of_robustbench() -> None:
    """As Rice2020Overfitting's there."""
    module = robustbench("resnet")
    theirs = lively(module.PreActResNet(module.PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True, out_shortcut=True))
    ours = build_model("preact_resnet_18", 10, (3, 32, 32), "none").eval()
    ours.load_state_dict(fitted(theirs.state_dict(), ours))
    batch = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(batch).logits, theirs(batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_s_own_file_predicts_as_torchvision_does(tmp_path: Path, name: str) -> None:
    """Its linear layer is called fc, and classifier.3."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = build_model(f"torchvision:{name}", 3, (3, 64, 64)).eval()
    ours.load_state_dict(fit(read_entries(tmp_path / "w.pth"), ours, "x").state_dict)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs((images - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1))
        torch.testing.assert_close(ours(images).logits, expected, atol=1e-5, rtol=1e-5)


class Wrapped(nn.Module):
    """As RobustBench wraps the networks of Salman et al. 2020."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.normalize = nn.Module()
        self.normalize.register_buffer("mean", MEAN.view(1, 3, 1, 1))
        self.normalize.register_buffer("std", STD.view(1, 3, 1, 1))
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images - self.normalize.mean) / self.normalize.std)
        return logits


@pytest.fixture(scope="module")
def source() -> Wrapped:
    """A network of others, with the normalisation before it, and an average of its weights that is another network."""
    torch.manual_seed(3)
    return Wrapped(lively(torchvision.models.resnet18(num_classes=2))).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def other() -> dict[str, Tensor]:
    torch.manual_seed(4)
    return lively(torchvision.models.resnet18(num_classes=2)).state_dict()


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def published(kind: str, source: Wrapped, other: dict[str, Tensor]) -> Any:  # noqa: PLR0911
    """A checkpoint of the source network; `other` is what must not be taken."""
    plain = source.model.state_dict()
    if kind == "robustbench":
        return source.state_dict()
    if kind == "madry":
        both = prefixed("module.model.", plain) | prefixed("module.attacker.model.", plain)
        both |= {"module.normalizer.new_mean": MEAN.view(3, 1, 1), "module.normalizer.new_std": STD.view(3, 1, 1)}
        both |= {"module.attacker.normalize.new_mean": MEAN, "module.attacker.normalize.new_std": STD}
        return {"model": both, "epoch": 150, "schedule": None, "optimizer": {"state": {0: {"m": torch.zeros(2)}}}}
    if kind == "ema":
        return {"epoch": 3, "state_dict": prefixed("module.", other), "state_dict_ema": prefixed("module.", plain)}
    if kind == "torchvision references":
        average = {"n_averaged": torch.tensor(7), **prefixed("module.", plain)}
        return {"model": other, "model_ema": average, "args": None}
    if kind == "lightning":
        metrics = {"val_acc.tp": torch.zeros(1), "val_acc.confmat": torch.zeros(2, 2)}
        return {"state_dict": prefixed("model.", plain) | metrics, "pytorch-lightning_version": "2"}
    if kind == "sequential":
        return {"0.mean": MEAN, "0.std": STD, **prefixed("1.", plain)}
    if kind == "compiled":
        return prefixed("module._orig_mod.", plain)
    old = {name: value for name, value in plain.items() if not name.endswith("num_batches_tracked")}
    return {"old": old, "deep": {"model": {"net": OrderedDict(plain)}}, "plain": plain}[kind]


KINDS = ["plain", "robustbench", "madry", "ema", "torchvision references", "lightning", "sequential", "compiled", "old"]


@pytest.mark.parametrize("kind", [*KINDS, "deep"])
def test_the_imported_network_predicts_as_the_source_does(
    tmp_path: Path, source: Wrapped, other: dict[str, Tensor], kind: str
) -> None:
    torch.save(published(kind, source, other), tmp_path / "w.pt")
    ours = build_model("torchvision:resnet18", 2, (3, 32, 32)).eval()
    found = fit(read_entries(tmp_path / "w.pt"), ours, "w.pt")
    ours.load_state_dict(found.state_dict)
    images = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images).logits, source(images), atol=1e-5, rtol=1e-5)
    notes = {
        "madry": ("model.module.model is used; model.module.attacker.model has the same weights and is ignored",),
        "ema": ("state_dict_ema.module is used; state_dict.module has other weights and is ignored",),
        "torchvision references": (
            "model_ema.module is used; model has other weights and is ignored",
            "ignored, not part of the network: n_averaged",
        ),
        "lightning": ("ignored, not part of the network: val_acc.tp, val_acc.confmat",),
    }
    assert found.notes == notes.get(kind, ())


@pytest.mark.parametrize("name", ["ema", "model_ema", "EMA", "modelEMA", "netEma", "ema_model.module", "ema2"])
def test_an_average_is_preferred(name: str) -> None:
    assert preferred("net", name) == name


@pytest.mark.parametrize("name", ["schema", "SCHEMA", "old_schema", "remainder", "Emanuel"])
def test_an_average_is_known_by_a_word_of_its_name(name: str) -> None:
    assert preferred("net", name) == "net"


def preferred(*names: str) -> str:
    """Which of several copies is used."""
    network = build_model("digits_cnn", 10, (1, 8, 8))
    return fit(dict.fromkeys(names, network.state_dict()), network, "w.pt").notes[0].partition(" is used")[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(source: Wrapped, dtype: torch.dtype) -> None:
    """The normalisation too is stored in the lower precision, and must still count as the network's own."""
    stored = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in source.state_dict().items()
    }
    ours = build_model("torchvision:resnet18", 2, (3, 32, 32)).eval()
    found = fitted(stored, ours)
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    expected = {name: value.float() for name, value in stored.items()}
    assert torch.equal(found["fc.weight"], expected["model.fc.weight"])
    assert torch.equal(found["body.conv1.weight"], expected["model.conv1.weight"])


def test_a_normalisation_that_is_stored_must_be_the_networks() -> None:
    ours = build_model("preact_resnet_18", 10, (3, 32, 32), "cifar10")
    statistics = {
        "mu": torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1),
        "sigma": torch.tensor([0.2471, 0.2435, 0.2616]),
    }
    fitted({**ours.state_dict(), **statistics}, ours)
    statistics["sigma"] = torch.tensor([0.2, 0.2, 0.2])
    with pytest.raises(ConfigError, match=r"sigma = \[0\.2, 0\.2, 0\.2\], is not the network's; no model\.norm"):
        fitted({**ours.state_dict(), **statistics}, ours)
    bare = build_model("preact_resnet_18", 10, (3, 32, 32), "none")
    with pytest.raises(ConfigError, match="its normalization"):
        fitted({**bare.state_dict(), **statistics}, bare)


@pytest.mark.parametrize("choice", ["none", "cifar10", "per_image"])
def test_the_normalisation_that_a_file_carries_is_named(source: Wrapped, choice: str) -> None:
    ours = build_model("torchvision:resnet18", 2, (3, 32, 32), choice)
    with pytest.raises(ConfigError) as caught:
        fitted(source.state_dict(), ours)
    assert "normalize.mean = [0.485, 0.456, 0.406], is not the network's" in caught.value.reason
    assert caught.value.remedy == "set model.normalization to imagenet"


WRONG: list[tuple[Any, str]] = [
    (lambda found: found.pop("fc.bias"), r"fc\.bias is missing\)"),
    (lambda found: found.update(extra=torch.zeros(1)), r"extra is unused\)"),
    (lambda found: found.update({"fc.bias": torch.zeros(3)}), r"fc\.bias is \(3,\), not \(10,\)\)"),
    (lambda found: found.update({"fc.bias": torch.zeros(10, dtype=torch.int8)}), r"fc\.bias has type int8\)"),
    (
        lambda found: found.update({"fc.bias": torch.full((10,), torch.nan)}),
        r"fc\.bias: values are not finite; take",
    ),
    (lambda found: found.update({"fc.weight": found["fc.weight"] / 0}), r"fc\.weight: values are not finite"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_another_network(change: Any, words: str, prefix: str) -> None:
    network = build_model("digits_cnn", 10, (1, 8, 8))
    found = dict(network.state_dict())
    change(found)
    with pytest.raises(ConfigError, match=words):
        fitted(prefixed(prefix, found), network)


@pytest.mark.parametrize("kind", ["plain", "madry", "ema"])
def test_a_new_head_takes_the_rest_of_a_published_network(source: Wrapped, other: dict[str, Tensor], kind: str) -> None:
    ours = build_model("torchvision:resnet18", 5, (3, 32, 32))
    entries = {name: value for name, value in published(kind, source, other).items() if isinstance(value, dict)}
    entries = entries or {"": published(kind, source, other)}
    with pytest.raises(ConfigError, match=r"its head has 2 classes, the data has 5; choose model\.name and data"):
        fit(entries, ours, "x")
    with pytest.raises(ConfigError, match=r"its head has 2 classes, the data has 5; set model\.head to new"):
        fit(entries, ours, "x", new_head=False)
    found = fit(entries, ours, "x", new_head=True).state_dict
    assert set(ours.state_dict()) - set(found) == {"fc.weight", "fc.bias"}
    assert torch.equal(found["body.conv1.weight"], source.model.state_dict()["conv1.weight"])


def test_a_file_without_a_head_serves_where_the_head_is_new(source: Wrapped) -> None:
    ours = build_model("torchvision:resnet18", 2, (3, 32, 32))
    body = {name: value for name, value in source.model.state_dict().items() if not name.startswith("fc.")}
    with pytest.raises(ConfigError, match=r"fc\.weight is missing and 1 more\); set model\.head to new"):
        fit({"": body}, ours, "x", new_head=False)
    with pytest.raises(ConfigError, match=r"fc\.weight is missing and 1 more\); choose model\.name"):
        fit({"": body}, ours, "x")
    assert fit({"": body}, ours, "x", new_head=True).notes == ()
    with pytest.raises(ConfigError, match=r"conv1\.weight is missing\); choose model\.name"):
        fit({"": {name: value for name, value in body.items() if name != "conv1.weight"}}, ours, "x", new_head=True)
    with pytest.raises(ConfigError, match=r"contains more than this network \(denoiser\.weight is unused\)"):
        fit({"": {**body, "denoiser.weight": torch.zeros(2)}}, ours, "x", new_head=True)


def test_a_file_may_hold_the_weights_under_both_names(source: Wrapped) -> None:
    ours = build_model("torchvision:resnet18", 2, (3, 32, 32))
    theirs = source.model.state_dict()
    ours.load_state_dict(fit({"": theirs}, ours, "x").state_dict)
    found = fit({"": ours.state_dict() | theirs}, ours, "x")
    assert all(torch.equal(found.state_dict[name], value) for name, value in ours.state_dict().items())


def test_layers_before_the_network_are_not_dropped(source: Wrapped) -> None:
    """A denoiser before the classifier would change every prediction."""
    ours = build_model("torchvision:resnet18", 2, (3, 32, 32))
    found = {"denoiser.conv.weight": torch.zeros(3, 3, 3, 3), **source.state_dict()}
    with pytest.raises(ConfigError, match=r"contains more than this network \(denoiser\.conv\.weight is unused\)"):
        fitted(found, ours)


def test_a_file_of_something_else_says_so() -> None:
    ours = build_model("digits_cnn", 10, (1, 8, 8))
    with pytest.raises(ConfigError, match="contains none of this network's weights"):
        fit({}, ours, "x")
    with pytest.raises(ConfigError, match="contains none of this network's weights"):
        fitted({"step": torch.zeros(1)}, ours)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the file ran code')",)


def test_files_of_every_kind(tmp_path: Path) -> None:
    weights = build_model("digits_cnn", 10, (1, 8, 8)).state_dict()
    save_file(weights, tmp_path / "a.safetensors")
    save_file(weights, tmp_path / "named otherwise.pt")
    torch.save(weights, tmp_path / "b.pt")
    torch.save(weights, tmp_path / "before 2020.pt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "c.pth")
    for name, entry in [("a.safetensors", ""), ("named otherwise.pt", ""), ("b.pt", ""), ("before 2020.pt", "")]:
        assert set(read_entries(tmp_path / name)[entry]) == set(weights)
    assert set(read_entries(tmp_path / "c.pth")) == {"state_dict"}


def refused(path: Path) -> UserError:
    with pytest.raises(UnavailableError) as caught:
        read_entries(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"file={path}: ")
    return caught.value


def test_each_kind_of_unusable_file_has_its_own_remedy(tmp_path: Path) -> None:
    network = build_model("digits_cnn", 10, (1, 8, 8))
    weights = network.state_dict()
    torch.save({"state_dict": weights, "args": Evil()}, tmp_path / "evil.pt")
    torch.save(network, tmp_path / "network.pt")
    torch.save(weights, tmp_path / "good.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "good.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still met
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name in ("good.pt", "legacy.pt", "good.safetensors"):
        (tmp_path / f"cut-{name}").write_bytes((tmp_path / name).read_bytes()[:600])
    (tmp_path / "page.pt").write_text("\n<!DOCTYPE html><html>Sign in</html>")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "text.pt").write_text(json.dumps([1, 2]))
    (tmp_path / "empty.pt").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.write(tmp_path / "good.pt", "model/good.pt")
    expected = {
        "evil.pt": (
            "contains more than weights (exec), and loading it would run code",
            "save only its state_dict",
        ),
        "network.pt": ("contains more than weights (tla_service.models", "save only its state_dict"),
        "script.pt": ("a TorchScript program", "torch.jit.load"),
        "cut-good.pt": ("truncated or damaged", "download it again"),
        "cut-legacy.pt": ("truncated or damaged", "download it again"),
        "cut-good.safetensors": ("truncated or damaged", "download it again"),
        "page.pt": ("a web page, not weights", "download the file that the page links to"),
        "pointer.pt": ("a Git LFS pointer", "git lfs pull"),
        "text.pt": ("neither a PyTorch file nor safetensors", "torch.save or safetensors"),
        "empty.pt": ("neither a PyTorch file nor safetensors", "torch.save or safetensors"),
        "archive.pt": ("a zip archive that torch.save did not write", "unpack it"),
        "none.pt": ("there is no such file", "give a file of weights"),
    }
    for name, (reason, remedy) in expected.items():
        error = refused(tmp_path / name)
        assert reason in error.reason, name
        assert remedy in error.remedy, name
