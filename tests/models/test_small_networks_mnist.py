import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tla_service.errors import ConfigError
from tla_service.models import build_model
from tla_service.models.classifier import AtLayer


def _convolution(channels_in: int, channels_out: int) -> int:
    return 9 * channels_in * channels_out + channels_out + 2 * channels_out  # weights, biases, BatchNorm


def _hidden(features: int) -> int:
    return features * 1024 + 1024 + 2 * 1024


_CONVOLUTIONS = _convolution(1, 32) + _convolution(32, 64) + _convolution(64, 128) + _convolution(128, 256)
_LOGITS = 1024 * 10 + 10


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist_cnn", _CONVOLUTIONS + _hidden(7 * 7 * 256) + _LOGITS),
        ("mnist_mlp", _hidden(784) + _hidden(1024) + _hidden(1024) + _LOGITS),
    ],
)
def test_parameter_count(name: str, expected: int) -> None:
    with torch.device("meta"):
        network = build_model(name, 10, (1, 28, 28))
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_forward_follows_table_5() -> None:
    network = build_model("mnist_cnn", 10, (1, 12, 12)).double()
    images = torch.rand(3, 1, 12, 12, dtype=torch.float64)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hidden = next(module for module in network.modules() if isinstance(module, nn.Linear))
    features = images
    for index, convolution in enumerate(convolutions):
        features = F.conv2d(features, convolution.weight, convolution.bias, padding=1)
        mean = features.mean((0, 2, 3), keepdim=True)
        variance = features.var((0, 2, 3), keepdim=True, correction=0)
        features = ((features - mean) / (variance + 1e-3).sqrt()).clamp_min(0)  # scale 1, shift 0 at the start
        if index in {1, 3}:
            features = F.max_pool2d(features, 2)
    features = features.flatten(1) @ hidden.weight.T + hidden.bias
    features = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-3).sqrt()
    torch.testing.assert_close(network(images).embeddings, features.clamp_min(0))


@pytest.mark.parametrize("name", ["mnist_cnn", "mnist_mlp"])
def test_initial_weights(name: str) -> None:
    layers = [m for m in build_model(name, 10, (1, 12, 12)).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        assert layer.bias is not None
        assert (layer.bias == 0.1).all()
        assert layer.weight.abs().max() <= 0.2
    # The deviation of a normal cut off at two sigma is 0.8796 of the normal's.
    assert max(layers, key=lambda layer: layer.weight.numel()).weight.std().item() == pytest.approx(0.08796, rel=0.01)


def test_batch_norm_moves_a_tenth_of_the_way() -> None:
    network = build_model("mnist_mlp", 10, (1, 4, 4))
    first_linear = next(module for module in network.modules() if isinstance(module, nn.Linear))
    first_norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm1d))
    images = torch.rand(5, 1, 4, 4)
    network(images)
    assert first_norm.running_mean is not None
    torch.testing.assert_close(first_norm.running_mean, 0.1 * first_linear(images.flatten(1)).mean(0))


@pytest.mark.parametrize(("layer", "number"), [("lower", 1), ("middle", 3)])
def test_hidden_layers_are_what_the_second_and_fourth_batchnorm_give(layer: str, number: int) -> None:
    network = build_model("mnist_cnn", 10, (1, 12, 12))
    images, seen = torch.rand(3, 1, 12, 12), []
    norm = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)][number]
    norm.register_forward_hook(lambda _module, _arguments, result: seen.append(result))
    network.eval()
    output = AtLayer(network, layer)(images)
    assert torch.equal(output.embeddings, seen[0].flatten(1))
    assert torch.equal(output.logits, network(images).logits)


def test_logits_can_be_the_embeddings() -> None:
    network = build_model("small_cnn", 10, (1, 12, 12))
    output = AtLayer(network, "logits")(torch.rand(3, 1, 12, 12))
    assert torch.equal(output.embeddings, output.logits)


def test_a_network_without_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.triplet_layer=lower: SmallCNN has no layer of this name"):
        AtLayer(build_model("small_cnn", 10, (1, 12, 12)), "lower")
