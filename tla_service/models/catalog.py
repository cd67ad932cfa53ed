"""Networks by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Final

from torch import nn

from tla_service.errors import ConfigError
from tla_service.models.classifier import ImageClassifier
from tla_service.models.mnist_cnn import build_mnist_cnn, build_mnist_mlp
from tla_service.models.normalization import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ChannelNormalization,
    PerImageStandardization,
)
from tla_service.models.preact_resnet import PreActResNet18
from tla_service.models.small_cnn import build_digits_cnn, build_small_cnn
from tla_service.models.tiny_imagenet_resnet import TinyImageNetResNet, basic_block, bottleneck_block
from tla_service.models.torchvision_classifier import (
    TORCHVISION_PREFIX,
    build_torchvision_classifier,
    torchvision_names,
)
from tla_service.models.wide_resnet import MadryWideResNet, WideResNet

ImageShape = tuple[int, int, int]

_NORMALIZATIONS: Final = ("default", "none", "per_image", "cifar10", "imagenet")
_CHANNEL_STATISTICS = {"cifar10": (CIFAR10_MEAN, CIFAR10_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}


@dataclass(frozen=True)
class _Network:
    """A network: what it is, how to build it, its default normalization, and the heights and widths it takes."""

    description: str
    build: Callable[[int, ImageShape, nn.Module], ImageClassifier]
    normalization: str = "none"
    min_size: int = 1
    size_multiple: int = 1


def _convolutional(build: Callable[..., ImageClassifier]) -> Callable[[int, ImageShape, nn.Module], ImageClassifier]:
    """For networks that average over the image at the end and so only need the number of channels."""

    def build_for_shape(num_classes: int, image_shape: ImageShape, normalization: nn.Module) -> ImageClassifier:
        return build(num_classes=num_classes, in_channels=image_shape[0], normalization=normalization)

    return build_for_shape


_NETWORKS = {
    "digits_cnn": _Network("two convolutions without BatchNorm for the 8x8 digits; embedding 128", build_digits_cnn),
    "small_cnn": _Network(
        "two strided convolutions without BatchNorm for 28x28 or 32x32 on a CPU; embedding 128",
        build_small_cnn,
        min_size=4,
    ),
    "mnist_cnn": _Network(
        "the paper's MNIST network (Mao et al. 2019, Table 5); embedding 1024", build_mnist_cnn, min_size=4
    ),
    "mnist_mlp": _Network("the authors' MNIST multilayer perceptron; embedding 1024", build_mnist_mlp),
    "wrn_32_10": _Network(
        "the paper's CIFAR-10 network, Madry et al.'s wide ResNet (Table 6); embedding 640",
        _convolutional(partial(MadryWideResNet, 32, 10)),
        "per_image",
        # Its average-pooled shortcuts and its convolutions disagree on odd sizes, twice.
        size_multiple=4,
    ),
    "wrn_28_10": _Network(
        "wide ResNet 28-10 as in TRADES and RobustBench; embedding 640", _convolutional(partial(WideResNet, 28, 10))
    ),
    "wrn_34_10": _Network(
        "wide ResNet 34-10 as in TRADES and RobustBench; embedding 640", _convolutional(partial(WideResNet, 34, 10))
    ),
    "preact_resnet_18": _Network(
        "pre-activation ResNet-18 as in Rice et al. 2020; embedding 512", _convolutional(PreActResNet18), "cifar10"
    ),
    "tiny_resnet50_stride2": _Network(
        "the paper's main Tiny ImageNet network; embedding 2048",
        _convolutional(partial(TinyImageNetResNet, bottleneck_block, (2, 3, 5, 2), 2)),
        "per_image",
    ),
    "tiny_resnet50_stride1": _Network(
        "the same with a stride-1 stem (Table 7), about 16 times the work; embedding 2048",
        _convolutional(partial(TinyImageNetResNet, bottleneck_block, (2, 3, 5, 2), 1)),
        "per_image",
    ),
    "tiny_resnet20_stride1": _Network(
        "the paper's small Tiny ImageNet network (Table 7); embedding 512",
        _convolutional(partial(TinyImageNetResNet, basic_block, (1, 1, 1, 1), 1)),
        "per_image",
    ),
}
MODEL_DESCRIPTIONS = {name: network.description for name, network in _NETWORKS.items()}


def model_names() -> tuple[str, ...]:
    """Names of this project's networks; ``torchvision:<name>`` works besides these."""
    return tuple(_NETWORKS)


def build_model(
    name: str, num_classes: int, image_shape: ImageShape, normalization: str = "default"
) -> ImageClassifier:
    """Builds a network with fresh weights, drawn from torch's global generator.

    Args:
        name: One of :func:`model_names`, or ``torchvision:<name>``.
        num_classes: K, at least 2.
        image_shape: (C, H, W).
        normalization: One of ``default``, ``none``, ``per_image``, ``cifar10``, ``imagenet``. ``default`` is the
            network's own: its paper's, or ``none`` where that has three channels and the images another number.

    Returns:
        The network, on the CPU unless torch's default device says otherwise, in training mode.

    Raises:
        ConfigError: The name or the normalization is unknown, or the network does not support these images.
    """
    network = _find(name)
    if num_classes < 2:
        reason = "a classifier needs at least two classes"
        raise ConfigError("model.num_classes", num_classes, reason, "check the labels of the data")
    _check_shape(name, network, image_shape)
    return network.build(num_classes, image_shape, _build_normalization(normalization, network, image_shape[0]))


def normalization_with(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """Name of the normalization with these statistics per channel, to within 0.001; None if there is none."""

    def alike(these: Sequence[float], those: Sequence[float]) -> bool:
        return len(these) == len(those) and all(abs(a - b) < 1e-3 for a, b in zip(these, those, strict=True))

    known = _CHANNEL_STATISTICS.items()
    return next((name for name, (means, stds) in known if alike(mean, means) and alike(std, stds)), None)


def _find(name: str) -> _Network:
    if name in _NETWORKS:
        return _NETWORKS[name]
    if name in torchvision_names():
        return _Network(name, partial(build_torchvision_classifier, name), "imagenet")
    prefixed = TORCHVISION_PREFIX + name
    candidates = (*model_names(), *torchvision_names())
    matches = [prefixed] if prefixed in candidates else get_close_matches(name, candidates, n=1)
    hint = f"did you mean {matches[0]}? " if matches else ""
    known = f"known are {', '.join(model_names())} and torchvision's classifiers as {TORCHVISION_PREFIX}<name>"
    raise ConfigError("model.name", name, "there is no such network", hint + known)


def _check_shape(name: str, network: _Network, image_shape: ImageShape) -> None:
    channels, height, width = image_shape
    size = f"{channels}x{height}x{width}"
    if channels < 1 or min(height, width) < network.min_size:
        reason = f"it cannot take {size} images: it needs at least {network.min_size}x{network.min_size} pixels"
        remedy = "choose larger images or another network, for example mnist_mlp, which takes any size"
        raise ConfigError("model.name", name, reason, remedy)
    if height % network.size_multiple or width % network.size_multiple:
        reason = f"it cannot take {size} images: height and width must be multiples of {network.size_multiple}"
        remedy = "resize the images or choose another network, for example wrn_28_10, which takes any size"
        raise ConfigError("model.name", name, reason, remedy)


def _build_normalization(choice: str, network: _Network, channels: int) -> nn.Module:
    if choice not in _NORMALIZATIONS:
        remedy = f"choose from {', '.join(_NORMALIZATIONS)}"
        raise ConfigError("model.normalization", choice, "there is no such normalization", remedy)
    resolved = network.normalization if choice == "default" else choice
    if resolved == "per_image":
        return PerImageStandardization()
    if resolved not in _CHANNEL_STATISTICS:
        return nn.Identity()
    mean, std = _CHANNEL_STATISTICS[resolved]
    if channels == len(mean):
        return ChannelNormalization(mean, std)
    if choice == "default":
        return nn.Identity()
    reason = f"it has {len(mean)} channels and the images have {channels}"
    raise ConfigError("model.normalization", choice, reason, "choose none or per_image")
