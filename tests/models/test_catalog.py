import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from tla_service.errors import ConfigError
from tla_service.models import Architecture, ImageClassifier, ModelOutput, build_model, model_names
from tla_service.models.classifier import ChannelNormalization, PerImageStandardization
from tla_service.models.resnets import MadryWideResNet, WideResNet

_EMBEDDING_SIZES = {
    "digits_cnn": 128,
    "small_cnn": 128,
    "cifar_cnn": 128,
    "cifar_cnn_bn": 128,
    "mnist_cnn": 1024,
    "mnist_mlp": 1024,
    "wrn_32_10": 640,
    "wrn_28_10": 640,
    "wrn_34_10": 640,
    "preact_resnet_18": 512,
    "tiny_resnet50_stride2": 2048,
    "tiny_resnet50_stride1": 2048,
    "tiny_resnet20_stride1": 512,
}
_SHAPES = {"digits_cnn": (1, 8, 8), "small_cnn": (1, 28, 28), "mnist_cnn": (1, 28, 28), "mnist_mlp": (1, 28, 28)}
_CPU_SHAPES = {
    "digits_cnn": (1, 8, 8),
    "small_cnn": (3, 32, 32),
    "cifar_cnn": (3, 32, 32),
    "cifar_cnn_bn": (3, 32, 32),
    "mnist_cnn": (1, 12, 12),
    "mnist_mlp": (1, 12, 12),
    "madry_8_1": (3, 8, 8),
    "wide_10_1": (3, 8, 8),
    "preact_resnet_18": (3, 8, 8),
    "tiny_resnet50_stride2": (3, 32, 32),
    "tiny_resnet20_stride1": (3, 8, 8),
    "torchvision:resnet18": (3, 32, 32),
}


def _build_small(name: str) -> ImageClassifier:
    """The network, or a narrow one of the same family in place of the three large ones."""
    if name == "madry_8_1":
        return MadryWideResNet(8, 1, num_classes=10, in_channels=3, normalization=PerImageStandardization())
    if name == "wide_10_1":
        return WideResNet(10, 1, num_classes=10, in_channels=3, normalization=nn.Identity())
    return build_model(name, 10, _CPU_SHAPES[name])


@pytest.mark.parametrize("name", model_names())
def test_shapes_and_every_parameter_used(name: str) -> None:
    """On the meta device: DDP stops at a parameter without a gradient."""
    shape = _SHAPES.get(name, (3, 64, 64) if "tiny" in name else (3, 32, 32))
    with torch.device("meta"):
        network = build_model(name, 7, shape)
        images = torch.zeros(2, *shape, requires_grad=True)
        output = network(images)
    assert isinstance(output, ModelOutput)
    assert output.logits.shape == (2, 7)
    assert output.embeddings.shape == (2, _EMBEDDING_SIZES[name])
    assert network.embedding_size == _EMBEDDING_SIZES[name]
    assert isinstance(network.classifier, nn.Linear)
    used = {"images": images} | dict(network.named_parameters())
    gradients = torch.autograd.grad(output.logits.sum(), list(used.values()), allow_unused=True)
    assert [path for path, gradient in zip(used, gradients, strict=True) if gradient is None] == []


@pytest.mark.parametrize("name", _CPU_SHAPES)
def test_evaluation(name: str) -> None:
    """In float64: logits from embeddings, signs, no influence of batch mates, a gradient for every image."""
    network = _build_small(name).double().eval()
    images = torch.rand(3, *_CPU_SHAPES[name], dtype=torch.float64, requires_grad=True)
    logits, embeddings = network(images)
    assert logits.dtype == embeddings.dtype == torch.float64
    assert torch.equal(logits, network.classifier(embeddings))
    assert (embeddings.min() < 0) == (name == "madry_8_1")
    torch.testing.assert_close(network(images[1:2]).logits, logits[1:2], rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", _CPU_SHAPES)
def test_channels_last_and_autocast(name: str) -> None:
    network = _build_small(name).eval()
    images = torch.rand(2, *_CPU_SHAPES[name])
    expected = network(images).logits
    layout: ImageClassifier = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        layout(images.contiguous(memory_format=torch.channels_last)).logits, expected, rtol=1e-3, atol=1e-4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, embeddings = network(images)
    assert logits.dtype == torch.bfloat16
    assert embeddings.shape == (2, network.embedding_size)
    scale = expected.abs().max()
    assert (logits.float() - expected).abs().max() < 0.1 * scale


@pytest.mark.parametrize("name", ["digits_cnn", "madry_8_1", "wide_10_1", "tiny_resnet20_stride1"])
def test_compiles_without_a_graph_break(name: str) -> None:
    network = _build_small(name).eval()
    images = torch.rand(2, *_CPU_SHAPES[name])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, network(images).logits)
    torch.compiler.reset()


def test_same_seed_same_weights() -> None:
    torch.manual_seed(3)
    first = build_model("digits_cnn", 10, (1, 8, 8)).state_dict()
    torch.manual_seed(3)
    second = build_model("digits_cnn", 10, (1, 8, 8)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("wrn_32_1", "did you mean wrn_32_10"),
        ("resnet18", "did you mean torchvision:resnet18"),
        ("torchvision:resnet19", "did you mean torchvision:resnet18"),
        ("qqqq", "known are digits_cnn, "),
    ],
)
def test_unknown_name(name: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        build_model(name, 10, (3, 32, 32))
    assert (caught.value.subject, caught.value.value) == ("model.name", name)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("mnist_cnn", (1, 3, 28), "cannot take 1x3x28 images: it needs at least 4x4"),
        ("small_cnn", (1, 28, 3), "at least 4x4"),
        ("wrn_32_10", (3, 30, 32), "multiples of 4"),
        ("wrn_32_10", (3, 32, 33), "multiples of 4"),
        ("wrn_28_10", (3, 0, 32), "at least 1x1"),
        ("preact_resnet_18", (0, 32, 32), "cannot take 0x32x32"),
    ],
)
def test_impossible_image_shape(name: str, shape: tuple[int, int, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match), torch.device("meta"):
        build_model(name, 10, shape)


@pytest.mark.parametrize("name", [name for name in model_names() if name != "mnist_mlp"])
def test_smallest_image_that_is_not_refused_works(name: str) -> None:
    sizes = {"digits_cnn": 2, "small_cnn": 4, "cifar_cnn": 8, "cifar_cnn_bn": 8, "mnist_cnn": 4, "wrn_32_10": 4}
    smallest = sizes.get(name, 1)
    with torch.device("meta"):
        network = build_model(name, 10, (1, smallest, smallest)).eval()
        assert network(torch.zeros(2, 1, smallest, smallest)).logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "channels", "choice", "expected"),
    [
        ("mnist_cnn", 1, "default", nn.Identity),
        ("wrn_32_10", 3, "default", PerImageStandardization),
        ("wrn_28_10", 3, "default", nn.Identity),
        ("tiny_resnet50_stride2", 3, "default", PerImageStandardization),
        ("preact_resnet_18", 3, "default", ChannelNormalization),
        ("preact_resnet_18", 1, "default", nn.Identity),
        ("preact_resnet_18", 3, "none", nn.Identity),
        ("small_cnn", 1, "per_image", PerImageStandardization),
        ("small_cnn", 3, "imagenet", ChannelNormalization),
    ],
)
def test_normalization(name: str, channels: int, choice: str, expected: type[nn.Module]) -> None:
    with torch.device("meta"):
        network = build_model(name, 10, (channels, 32, 32), choice)
    assert type(network.normalization) is expected


@pytest.mark.parametrize(("choice", "mean"), [("imagenet", 0.485), ("cifar10", 0.4914)])
def test_channel_statistics_by_name(choice: str, mean: float) -> None:
    normalization = build_model("small_cnn", 10, (3, 8, 8), choice).normalization
    assert isinstance(normalization, ChannelNormalization)
    assert normalization.mean[0, 0, 0, 0].item() == pytest.approx(mean)


def test_impossible_normalization() -> None:
    with pytest.raises(ConfigError, match=r"model\.normalization=sobel: .*choose from default, none"):
        build_model("small_cnn", 10, (3, 8, 8), "sobel")
    with pytest.raises(ConfigError, match="it has 3 channels and the images have 1"):
        build_model("small_cnn", 10, (1, 8, 8), "imagenet")


@pytest.mark.parametrize(
    "name", ["wrn_28_10", "wrn_34_10", "wrn_32_10", "preact_resnet_18", "cifar_cnn", "cifar_cnn_bn"]
)
def test_an_activation_is_part_of_what_is_built_and_kept(name: str, tmp_path: Path) -> None:
    made = Architecture(name, activation="silu")
    facts = json.loads(json.dumps(made.write(tmp_path)))
    assert Architecture.described(facts, tmp_path) == made
    with torch.device("meta"):
        network = Architecture.described(facts, tmp_path).build(10, (3, 32, 32))
        plain = build_model(name, 10, (3, 32, 32))
    used = {id(module.activation) for module in network.modules() if hasattr(module, "activation")}
    assert used == {id(nn.functional.silu)}
    assert network.state_dict().keys() == plain.state_dict().keys()
    # Descriptions of before this setting, and of networks without it, are the same as ever.
    assert Architecture(name).write(tmp_path) == {"architecture": name, "normalization": "default"}
    assert Architecture.described({"architecture": name, "normalization": "none"}, tmp_path).activation == "default"


@pytest.mark.parametrize("name", ["mnist_cnn", "tiny_resnet20_stride1", "torchvision:resnet18"])
def test_networks_with_fixed_activations_refuse_another(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model.activation=silu: the activations of .* are fixed; leave it out, or"):
        Architecture(name, activation="silu").build(10, (3, 64, 64))
