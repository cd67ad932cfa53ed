"""From a name in the configuration to a network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from torch import nn

from tla_service.errors import ConfigError
from tla_service.models.classifier import ImageClassifier
from tla_service.models.mnist_cnn import build_mnist_cnn, build_mnist_mlp
from tla_service.models.names import NORMALIZATIONS, TORCHVISION_PREFIX, model_names
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
from tla_service.models.tiny_imagenet_resnet import build_tiny_resnet20, build_tiny_resnet50
from tla_service.models.torchvision_classifier import build_torchvision_classifier, torchvision_names
from tla_service.models.wide_resnet import MadryWideResNet, WideResNet

ImageShape = tuple[int, int, int]

_CHANNEL_STATISTICS = {"cifar10": (CIFAR10_MEAN, CIFAR10_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}


@dataclass(frozen=True)
class _Network:
    """How to build one network, its usual normalisation, and the heights and widths it can take."""

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
    "digits_cnn": _Network(build_digits_cnn),
    "small_cnn": _Network(build_small_cnn, min_size=4),
    "mnist_cnn": _Network(build_mnist_cnn, min_size=4),
    "mnist_mlp": _Network(build_mnist_mlp),
    # Its average-pooled shortcuts and its convolutions disagree on odd sizes, twice over.
    "wrn_32_10": _Network(_convolutional(partial(MadryWideResNet, 32, 10)), "per_image", size_multiple=4),
    "wrn_28_10": _Network(_convolutional(partial(WideResNet, 28, 10))),
    "wrn_34_10": _Network(_convolutional(partial(WideResNet, 34, 10))),
    "preact_resnet_18": _Network(_convolutional(PreActResNet18), "cifar10"),
    "tiny_resnet50_stride2": _Network(_convolutional(partial(build_tiny_resnet50, 2)), "per_image"),
    "tiny_resnet50_stride1": _Network(_convolutional(partial(build_tiny_resnet50, 1)), "per_image"),
    "tiny_resnet20_stride1": _Network(_convolutional(build_tiny_resnet20), "per_image"),
}


def build_model(
    name: str, num_classes: int, image_shape: ImageShape, normalization: str = "default"
) -> ImageClassifier:
    """Builds a network with fresh weights, drawn from torch's global generator.

    Args:
        name: One of :func:`~tla_service.models.names.model_names`, or ``torchvision:<name>``.
        num_classes: K, at least 2.
        image_shape: (C, H, W).
        normalization: One of ``default``, ``none``, ``per_image``, ``cifar10``, ``imagenet``. ``default`` is the
            network's own: its paper's or, where that is a mean and standard deviation of three channels and the
            images have another number, ``none``.

    Returns:
        The network, on the CPU unless torch's default device says otherwise, in training mode.

    Raises:
        ConfigError: The name or the normalisation is unknown, or the network cannot take these images.
    """
    network = _find(name)
    if num_classes < 2:
        raise ConfigError(
            "model.num_classes", num_classes, "a classifier needs at least two classes", "check the labels of the data"
        )
    _check_shape(name, network, image_shape)
    return network.build(num_classes, image_shape, _build_normalization(normalization, network, image_shape[0]))


def normalization_with(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """The normalization of these statistics by channel, to about four digits; None if there is none."""

    def alike(these: Sequence[float], those: Sequence[float]) -> bool:
        pairs = zip(these, those, strict=True) if len(these) == len(those) else [(0.0, 1.0)]
        return all(abs(one - other) < 1e-3 for one, other in pairs)

    return next(
        (name for name, known in _CHANNEL_STATISTICS.items() if alike(mean, known[0]) and alike(std, known[1])), None
    )


def _find(name: str) -> _Network:
    if name in _NETWORKS:
        return _NETWORKS[name]
    if name in torchvision_names():
        return _Network(partial(build_torchvision_classifier, name), "imagenet")
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
        raise ConfigError(
            "model.name",
            name,
            f"it cannot take {size} images: it needs at least {network.min_size}x{network.min_size} pixels",
            "choose larger images or another network, for example mnist_mlp, which takes any size",
        )
    if height % network.size_multiple or width % network.size_multiple:
        raise ConfigError(
            "model.name",
            name,
            f"it cannot take {size} images: height and width must be multiples of {network.size_multiple}",
            "resize the images or choose another network, for example wrn_28_10, which takes any size",
        )


def _build_normalization(choice: str, network: _Network, channels: int) -> nn.Module:
    if choice not in NORMALIZATIONS:
        raise ConfigError(
            "model.normalization", choice, "there is no such normalization", f"choose from {', '.join(NORMALIZATIONS)}"
        )
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
    raise ConfigError(
        "model.normalization",
        choice,
        f"it has {len(mean)} channels and the images have {channels}",
        "choose none or per_image",
    )
