"""timm's networks: fresh weights, their own normalization, and what timm does not have."""

import sys
from importlib.metadata import version

import pytest
import torch

from tla_service.errors import ConfigError, UnavailableError
from tla_service.models import Architecture
from tla_service.models.classifier import ChannelNormalization


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnavailableError, match=r"the package timm is not installed; pip install 'tla-service\[timm\]'"):
        Architecture("timm:resnet18").build(10, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "shape", "head", "size"),
    [
        ("resnet18", (3, 32, 32), "fc", 512),
        ("resnet18.a1_in1k", (3, 32, 32), "fc", 512),
        ("vit_tiny_patch16_224", (3, 32, 32), "head", 192),
        ("convnext_atto", (1, 32, 32), "head.fc", 320),
    ],
)
def test_a_network_equals_timms_with_the_same_weights(
    name: str, shape: tuple[int, int, int], head: str, size: int
) -> None:
    timm = pytest.importorskip("timm")
    network = Architecture(f"timm:{name}").build(7, shape).eval()
    assert network.found == f"input of {head}, {size} numbers"
    options = {"img_size": shape[1:]} if "vit" in name else {}
    original = timm.create_model(name, num_classes=7, in_chans=shape[0], **options).eval()
    state = network.state_dict()
    original.load_state_dict({theirs: state[ours] for ours, theirs in network.published_names().items()})
    images = torch.rand(2, *shape)
    output = network(images)
    assert output.embeddings.shape == (2, size)
    mean, std = (torch.tensor(original.default_cfg[each]).view(1, 3, 1, 1) for each in ("mean", "std"))
    seen = (images - mean) / std if shape[0] == 3 else images
    torch.testing.assert_close(output.logits, original(seen))
    assert isinstance(network.normalization, ChannelNormalization) == (shape[0] == 3)


def test_the_version_is_pinned() -> None:
    pytest.importorskip("timm")
    assert Architecture("timm:resnet18").requirements() == [f"timm=={version('timm')}"]


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("resnet_18", (3, 32, 32), "has no such network; did you mean timm:resnet"),
        ("hf_hub:someone/network", (3, 32, 32), "has no such network"),
        ("inception_v4", (3, 16, 16), "it cannot take 3x16x16 images"),
    ],
)
def test_refusals(name: str, shape: tuple[int, int, int], reason: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=rf"model.name=timm:{name}: .*{reason}") as caught:
        Architecture(f"timm:{name}").build(10, shape)
    assert "\n" not in str(caught.value)
