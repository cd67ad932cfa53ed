"""Every residual network against its forward pass written a second time, from the state dict."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tla_service.models import Architecture, build_model
from tla_service.models.classifier import PerImageStandardization
from tla_service.models.residual import Activation
from tla_service.models.resnets import MadryWideResNet, WideResNet


def _randomize_batch_norms(network: nn.Module) -> None:
    """Gives every BatchNorm its own statistics, scale and shift, so that a swapped or skipped one shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


def _batch_norm(state: dict[str, Tensor], name: str, inputs: Tensor, eps: float) -> Tensor:
    """Inference-mode BatchNorm, written out."""
    mean, variance, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (inputs - mean) / torch.sqrt(variance + eps) * weight + bias


def _lopsided_conv(inputs: Tensor, weight: Tensor, stride: int) -> Tensor:
    """TensorFlow's SAME convolution on even sizes: of an odd padding, the larger part is after."""
    total = weight.shape[2] - stride
    if total > 0:
        inputs = F.pad(inputs, (total // 2, total - total // 2, total // 2, total - total // 2))
    return F.conv2d(inputs, weight, stride=stride)


def _standardize(images: Tensor) -> Tensor:
    """Per image, for images that are far from constant."""
    flat = images.flatten(1)
    standardized = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)
    return standardized.view_as(images)


def _leaky(inputs: Tensor) -> Tensor:
    return torch.where(inputs < 0, 0.1 * inputs, inputs)


def _madry_embeddings(state: dict[str, Tensor], images: Tensor, blocks_per_group: int) -> Tensor:
    features = _lopsided_conv(_standardize(images), state["conv1.weight"], 1)
    for index in range(3 * blocks_per_group):
        name = f"blocks.{index}"
        stride = 2 if index in {blocks_per_group, 2 * blocks_per_group} else 1
        activated = _leaky(_batch_norm(state, f"{name}.bn1", features, 1e-3))
        shortcut = activated if index == 0 else features
        residual = _lopsided_conv(activated, state[f"{name}.conv1.weight"], stride)
        residual = _leaky(_batch_norm(state, f"{name}.bn2", residual, 1e-3))
        residual = _lopsided_conv(residual, state[f"{name}.conv2.weight"], 1)
        if stride == 2:
            corners = [shortcut[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
            shortcut = torch.stack(corners).mean(0)
        extra = residual.shape[1] - shortcut.shape[1]
        zeros = torch.zeros_like(residual[:, : extra // 2])
        features = residual + torch.cat([zeros, shortcut, zeros], dim=1)
    return _leaky(_batch_norm(state, "bn", features, 1e-3)).mean((2, 3))


@pytest.mark.parametrize("blocks_per_group", [1, 2])
def test_madry_forward_written_out(blocks_per_group: int) -> None:
    network = MadryWideResNet(
        6 * blocks_per_group + 2, 2, num_classes=5, in_channels=3, normalization=PerImageStandardization()
    )
    _randomize_batch_norms(network)
    network.double().eval()
    images = torch.rand(2, 3, 16, 12, dtype=torch.float64)
    embeddings = network(images).embeddings
    torch.testing.assert_close(embeddings, _madry_embeddings(network.state_dict(), images, blocks_per_group))
    assert embeddings.min() < 0


def _wide_embeddings(state: dict[str, Tensor], images: Tensor, num_blocks: int) -> Tensor:
    features = F.conv2d(images, state["conv1.weight"], padding=1)
    for group, stride_of_first in ((1, 1), (2, 2), (3, 2)):
        for index in range(num_blocks):
            name = f"block{group}.layer.{index}"
            stride = stride_of_first if index == 0 else 1
            activated = _batch_norm(state, f"{name}.bn1", features, 1e-5).clamp_min(0)
            projection = state.get(f"{name}.convShortcut.weight")
            shortcut = features if projection is None else F.conv2d(activated, projection, stride=stride)
            residual = F.conv2d(activated, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            residual = _batch_norm(state, f"{name}.bn2", residual, 1e-5).clamp_min(0)
            features = shortcut + F.conv2d(residual, state[f"{name}.conv2.weight"], padding=1)
    return _batch_norm(state, "bn1", features, 1e-5).clamp_min(0).mean((2, 3))


def test_standard_forward_written_out() -> None:
    network = WideResNet(16, 2, num_classes=5, in_channels=3, normalization=nn.Identity())
    _randomize_batch_norms(network)
    network.double().eval()
    images = torch.rand(2, 3, 16, 12, dtype=torch.float64)
    torch.testing.assert_close(network(images).embeddings, _wide_embeddings(network.state_dict(), images, 2))


def _relu(inputs: Tensor) -> Tensor:
    return inputs.clamp_min(0)


def _silu(inputs: Tensor) -> Tensor:
    return inputs / (1 + torch.exp(-inputs))


def _preact_embeddings(state: dict[str, Tensor], images: Tensor, act: Activation = _relu) -> Tensor:
    mean, std = (torch.tensor(v, dtype=images.dtype)[:, None, None] for v in _CIFAR10)
    features = F.conv2d((images - mean) / std, state["conv1.weight"], padding=1)
    for layer in (1, 2, 3, 4):
        for index in (0, 1):
            name, stride = f"layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            activated = act(_batch_norm(state, f"{name}.bn1", features, 1e-5))
            projection = state.get(f"{name}.shortcut.0.weight")
            shortcut = features if projection is None else F.conv2d(activated, projection, stride=stride)
            residual = F.conv2d(activated, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            residual = act(_batch_norm(state, f"{name}.bn2", residual, 1e-5))
            features = shortcut + F.conv2d(residual, state[f"{name}.conv2.weight"], padding=1)
    return act(_batch_norm(state, "bn", features, 1e-5)).mean((2, 3))


_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


@pytest.mark.parametrize(("activation", "written_out"), [("default", _relu), ("relu", _relu), ("silu", _silu)])
def test_preact_forward_written_out(activation: str, written_out: Activation) -> None:
    network = Architecture("preact_resnet_18", activation=activation).build(10, (3, 16, 16))
    _randomize_batch_norms(network)
    network.double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(
        network(images).embeddings, _preact_embeddings(network.state_dict(), images, written_out), rtol=1e-5, atol=1e-5
    )


_GROUPS = {"tiny_resnet50": (2, 3, 5, 2), "tiny_resnet20": (1, 1, 1, 1)}


def _tiny_embeddings(state: dict[str, Tensor], images: Tensor, groups: tuple[int, ...], stem_stride: int) -> Tensor:
    features = _lopsided_conv(_standardize(images), state["stem.0.weight"], stem_stride)
    features = _batch_norm(state, "stem.1", features, 1e-3).clamp_min(0)
    if stem_stride == 2:
        features = F.max_pool2d(F.pad(features, (0, 1, 0, 1)), 3, 2)  # zeros lose against ReLUs
    firsts = [sum(groups[:group]) for group in range(4)]
    for index in range(sum(groups)):
        name, stride = f"blocks.{index}", 2 if index in firsts[1:] else 1
        residual = features
        for step in (1, 2, 3):
            if f"{name}.conv{step}.weight" in state:
                residual = _batch_norm(state, f"{name}.bn{step}", residual, 1e-3).clamp_min(0)
                residual = _lopsided_conv(residual, state[f"{name}.conv{step}.weight"], stride if step == 1 else 1)
        if index in firsts:
            features = F.conv2d(features, state[f"{name}.projection.weight"], stride=stride)
        features = features + residual
    return _batch_norm(state, "bn", features, 1e-3).clamp_min(0).mean((2, 3))


@pytest.mark.parametrize(
    ("name", "size"), [("tiny_resnet50_stride2", 32), ("tiny_resnet50_stride1", 8), ("tiny_resnet20_stride1", 16)]
)
def test_tiny_forward_written_out(name: str, size: int) -> None:
    network = build_model(name, 7, (3, size, size))
    _randomize_batch_norms(network)
    network.double().eval()
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    groups, stem_stride = _GROUPS[name.partition("_stride")[0]], int(name[-1])
    expected = _tiny_embeddings(network.state_dict(), images, groups, stem_stride)
    torch.testing.assert_close(network(images).embeddings, expected)
    assert network.embedding_size == expected.shape[1]
