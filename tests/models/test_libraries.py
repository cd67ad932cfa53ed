import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import nn

from tla_service.errors import ConfigError
from tla_service.models import ImageClassifier, build_model
from tla_service.models.libraries import torchvision_names
from tla_service.models.wrapped import WrappedClassifier

_FAMILIES = {  # name: (image size, embedding size as published)
    "resnet18": (32, 512),
    "mobilenet_v3_small": (32, 1024),
    "densenet121": (32, 1024),
    "efficientnet_b0": (32, 1280),
    "convnext_tiny": (32, 768),
    "swin_t": (32, 768),
    "googlenet": (32, 1024),
    "inception_v3": (96, 2048),
    "regnet_y_400mf": (32, 440),
    "shufflenet_v2_x0_5": (32, 1024),
    "mnasnet0_5": (32, 1280),
}


def _unsplit(network: ImageClassifier, name: str) -> nn.Module:
    """torchvision's own network with the same weights, put together again."""
    assert isinstance(network, WrappedClassifier)
    options = {"aux_logits": False, "init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    whole: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=7, **options)
    last = [path for path, module in whole.named_modules() if isinstance(module, nn.Linear)][-1]
    state = network.body.state_dict()
    state.update({f"{last}.{part}": value for part, value in network.fc.state_dict().items()})
    whole.load_state_dict(state, strict=True)
    return whole.eval()


@pytest.mark.parametrize("name", _FAMILIES)
def test_split_network_equals_the_whole_one(name: str) -> None:
    size, embedding_size = _FAMILIES[name]
    network = build_model(f"torchvision:{name}", 7, (3, size, size), normalization="none")
    assert network.training
    assert all(module.training for module in network.modules())
    network.eval()
    images = torch.rand(2, 3, size, size)
    output = network(images)
    assert network.embedding_size == embedding_size
    assert output.embeddings.shape == (2, embedding_size)
    assert torch.equal(output.logits, network.classifier(output.embeddings))
    torch.testing.assert_close(output.logits, _unsplit(network, name)(images))


@pytest.mark.parametrize(
    ("name", "size", "embedding_size"), [("vgg11", 32, 4096), ("vit_b_16", 32, 768), ("alexnet", 64, 4096)]
)
def test_large_families_without_their_weights(name: str, size: int, embedding_size: int) -> None:
    with torch.device("meta"):
        network = build_model(f"torchvision:{name}", 7, (3, size, size))
        output = network(torch.rand(2, 3, size, size))
    assert output.embeddings.shape == (2, embedding_size)
    assert output.logits.shape == (2, 7)


@pytest.mark.parametrize(("name", "published"), [("resnet18", 11_689_512), ("vit_b_16", 86_567_656)])
def test_published_parameter_count(name: str, published: int) -> None:
    with torch.device("meta"):
        network = build_model(f"torchvision:{name}", 1000, (3, 224, 224))
    assert sum(parameter.numel() for parameter in network.parameters()) == published


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "googlenet"])
def test_grey_images_replace_the_first_convolution_only(name: str) -> None:
    colour = build_model(f"torchvision:{name}", 7, (3, 32, 32))
    grey = build_model(f"torchvision:{name}", 7, (1, 32, 32))
    shapes = [(k, tuple(v.shape)) for k, v in colour.state_dict().items()]
    grey_shapes = [(k, tuple(v.shape)) for k, v in grey.state_dict().items()]
    changed = [(old, new) for old, new in zip(shapes, grey_shapes, strict=True) if old != new]
    ((path, old_shape), (new_path, new_shape)) = changed[0]
    assert len(changed) == 1
    assert path == new_path
    assert new_shape == (old_shape[0], 1, *old_shape[2:])
    assert grey.eval()(torch.rand(2, 1, 32, 32)).logits.shape == (2, 7)
    assert isinstance(grey.normalization, nn.Identity)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("squeezenet1_1", (3, 64, 64), "not the output of a linear layer"),
        ("alexnet", (3, 32, 32), r"cannot take 3x32x32 images \(.*too small"),
        ("inception_v3", (3, 32, 32), "cannot take 3x32x32 images"),
        ("vit_b_16", (3, 30, 30), "cannot take 3x30x30 images"),
        ("vit_b_16", (3, 32, 48), "cannot take 3x32x48 images"),
        ("maxvit_t", (3, 32, 32), "cannot take 3x32x32 images"),
    ],
)
def test_refusals(name: str, shape: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        build_model(f"torchvision:{name}", 7, shape)
    assert caught.value.subject == "model.name"
    assert caught.value.value == f"torchvision:{name}"


def test_names_cover_classifiers_only() -> None:
    names = torchvision_names()
    assert "torchvision:resnet18" in names
    assert not any("fasterrcnn" in name or "raft" in name or "fcn" in name for name in names)
