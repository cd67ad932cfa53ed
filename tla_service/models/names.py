"""The names a configuration may use for networks and normalisations. Pure Python: reading it does not import torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

MODEL_DESCRIPTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "digits_cnn": "two convolutions without BatchNorm for the 8x8 digits; embedding 128",
        "small_cnn": "two strided convolutions without BatchNorm for 28x28 or 32x32 on a CPU; embedding 128",
        "mnist_cnn": "the paper's MNIST network (Mao et al. 2019, Table 5); embedding 1024",
        "mnist_mlp": "the authors' MNIST multilayer perceptron; embedding 1024",
        "wrn_32_10": "the paper's CIFAR-10 network, Madry et al.'s wide ResNet (Table 6); embedding 640",
        "wrn_28_10": "wide ResNet 28-10 as in TRADES and RobustBench; embedding 640",
        "wrn_34_10": "wide ResNet 34-10 as in TRADES and RobustBench; embedding 640",
        "preact_resnet_18": "pre-activation ResNet-18 as in Rice et al. 2020; embedding 512",
        "tiny_resnet50_stride2": "the paper's main Tiny ImageNet network; embedding 2048",
        "tiny_resnet50_stride1": "the same with a stride-1 stem (Table 7), about 16 times the work; embedding 2048",
        "tiny_resnet20_stride1": "the paper's small Tiny ImageNet network (Table 7); embedding 512",
    }
)
"""One line a network, by the name that ``model.name`` takes."""

TORCHVISION_PREFIX: Final = "torchvision:"
"""``torchvision:resnet18`` names torchvision's classifier ``resnet18``."""

NORMALIZATIONS: Final = ("default", "none", "per_image", "cifar10", "imagenet")
"""What ``model.normalization`` takes; ``default`` is the network's own usual."""


def model_names() -> tuple[str, ...]:
    """Names of this project's networks, for help texts; ``torchvision:<name>`` works besides these."""
    return tuple(MODEL_DESCRIPTIONS)
