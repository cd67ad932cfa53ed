"""Weights of torchvision and timm are found in these libraries' caches, and predict what the library predicts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tests.models.test_weights import MEAN, STD, lively
from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.models import build_model
from tla_service.models.published import published_entries
from tla_service.models.weights import fit

FILE = "resnet18-f37072fd.pth"  # of IMAGENET1K_V1, its default


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("source", ["torchvision", "torchvision:IMAGENET1K_V1"])
def test_torchvision_s_cached_weights_predict_as_torchvision_does(cache: Path, source: str) -> None:
    torch.manual_seed(0)
    torch.save(lively(torchvision.models.resnet18()).state_dict(), cache / FILE)
    theirs = torchvision.models.resnet18(weights="IMAGENET1K_V1").eval()  # reads the cache
    ours = build_model("torchvision:resnet18", 1000, (3, 64, 64)).eval()
    entries = published_entries(source, "torchvision:resnet18")
    assert entries is not None
    ours.load_state_dict(fit(entries, ours, source, new_head=False).state_dict)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs((images - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1))
        torch.testing.assert_close(ours(images).logits, expected, atol=1e-5, rtol=1e-5)

    few = build_model("torchvision:resnet18", 7, (3, 64, 64))
    with pytest.raises(ConfigError, match=r"its head has 1000 classes, the data has 7; set model\.head to new"):
        fit(entries, few, source, new_head=False)
    body = fit(entries, few, source, new_head=True).state_dict
    assert set(few.state_dict()) - set(body) == {"fc.weight", "fc.bias"}
    with pytest.raises(ConfigError, match=r"not the network's; set model\.normalization to imagenet"):
        fit(entries, build_model("torchvision:resnet18", 7, (3, 64, 64), "none"), source, new_head=True)


@pytest.mark.parametrize(
    ("source", "name", "kind", "words"),
    [
        (
            "torchvision",
            "torchvision:resnet18",
            UnavailableError,
            ("models.get_model('resnet18', weights='IMAGENET1K",),
        ),
        ("torchvision:V9", "torchvision:resnet50", ConfigError, ("V9", "torchvision:IMAGENET1K_V2")),
        ("torchvision", "torchvision:googlenet", ConfigError, ("auxiliary heads", "choose another network")),
        ("torchvision", "digits_cnn", ConfigError, ("torchvision has no weights of digits_cnn",)),
        ("timm", "torchvision:resnet18", ConfigError, ("timm has no weights of torchvision:resnet18",)),
    ],
)
def test_what_is_not_cached_or_not_published(
    cache: Path, source: str, name: str, kind: type[UserError], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        published_entries(source, name)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == [], "nothing was downloaded"


def test_other_sources_are_no_library() -> None:
    assert published_entries("models:/x/1", "digits_cnn") is None
    assert published_entries("w.pt", "torchvision:resnet18") is None


@pytest.mark.parametrize(("source", "name"), [("timm", "resnet10t.c3_in1k"), ("timm:c3_in1k", "resnet10t")])
def test_timm_s_cached_weights_are_timm_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    timm: Any = pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"timm\.create_model\('resnet10t\.c3_in1k', pretrained=True\)"):
        published_entries(source, f"timm:{name}")
    with pytest.raises(ConfigError, match=r"no such weights of resnet10t; choose from timm:c3_in1k"):
        published_entries("timm:nothing", f"timm:{name}")
    repository = tmp_path / "models--timm--resnet10t.c3_in1k"
    for folder in ("refs", "snapshots/0123"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    torch.manual_seed(0)
    theirs = lively(timm.create_model("resnet10t"))
    save_file(theirs.state_dict(), repository / "snapshots" / "0123" / "model.safetensors")
    entries = published_entries(source, f"timm:{name}")
    assert entries is not None
    for key, value in theirs.state_dict().items():
        assert torch.equal(entries[""][key], value), key
    assert entries[""]["mean"].tolist() == pytest.approx([0.485, 0.456, 0.406])
