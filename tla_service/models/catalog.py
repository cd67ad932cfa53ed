"""Networks by name."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import nn
from torch.nn import functional as F

from tla_service.errors import ConfigError
from tla_service.models.classifier import ChannelNormalization, ImageClassifier, PerImageStandardization
from tla_service.models.libraries import (
    TIMM,
    TORCHVISION,
    build_timm,
    build_torchvision,
    timm_normalization,
    torchvision_names,
)
from tla_service.models.own_code import call_factory, code_requirements, distribution, is_factory, pack, unpack
from tla_service.models.resnets import MadryWideResNet, PreActResNet18, TinyImageNetResNet, WideResNet
from tla_service.models.small_networks import SmallCNN, build_mnist_cnn, build_mnist_mlp
from tla_service.models.wrapped import take_embedding, wrap
from tla_service.pixels import ImageShape

if TYPE_CHECKING:
    from tla_service.config import ModelConfig  # not in a registered version

_NORMALIZATIONS: Final = ("default", "none", "per_image", "cifar10", "imagenet")
_ACTIVATIONS: Final = {"relu": F.relu, "silu": F.silu}
_Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel
_CODE = "network"  # folder of a network's code beside its description
_CHANNEL_STATISTICS: dict[str, _Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),  # over pixels, as in Rice et al. 2020
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class _Network:
    """How to build a network; with ``one_size``, its weights depend on the height and width of the images.

    A foreign one returns logits, and is wrapped. The normalization has a name, or is given by its statistics.
    """

    build: Callable[..., Any]
    normalization: str | _Statistics = "none"
    one_size: bool = False
    min_size: int = 1
    size_multiple: int = 1
    foreign: bool = False


_TINY_50 = partial(TinyImageNetResNet, (2, 3, 5, 2), bottleneck=True)
_NETWORKS = {
    "digits_cnn": _Network(partial(SmallCNN, (32, 64), 3, (1, 2)), one_size=True),
    "small_cnn": _Network(partial(SmallCNN, (16, 32), 4, (2, 2)), one_size=True, min_size=4),
    "cifar_cnn": _Network(partial(SmallCNN, (32, 64, 128), 4, (2, 2, 2)), one_size=True, min_size=8),
    "cifar_cnn_bn": _Network(partial(SmallCNN, (32, 64, 128), 4, (2, 2, 2), batchnorm=True), one_size=True, min_size=8),
    "mnist_cnn": _Network(build_mnist_cnn, one_size=True, min_size=4),
    "mnist_mlp": _Network(build_mnist_mlp, one_size=True),
    # Its average-pooled shortcuts and its convolutions disagree on odd sizes, twice.
    "wrn_32_10": _Network(partial(MadryWideResNet, 32, 10), "per_image", size_multiple=4),
    "wrn_28_10": _Network(partial(WideResNet, 28, 10)),
    "wrn_34_10": _Network(partial(WideResNet, 34, 10)),
    "preact_resnet_18": _Network(PreActResNet18, "cifar10"),
    "tiny_resnet50_stride2": _Network(partial(_TINY_50, stem_stride=2), "per_image"),
    "tiny_resnet50_stride1": _Network(partial(_TINY_50, stem_stride=1), "per_image"),
    "tiny_resnet20_stride1": _Network(partial(TinyImageNetResNet, (1, 1, 1, 1), 1, bottleneck=False), "per_image"),
}


@dataclass(frozen=True)
class Architecture:
    """What a network is built from: everything but its weights, its number of classes and the shape of its images.

    The code of a network from outside this package is part of it, as an archive: what is built in workers, from a
    checkpoint or a registered version is what was checked before, wherever the folder is by then.
    """

    name: str
    normalization: str = "default"
    embedding: str | None = None
    code: bytes | None = field(default=None, repr=False)
    activation: str = "default"

    @classmethod
    def of(cls, settings: "ModelConfig", code: bytes | None = None) -> Self:
        """The architecture that a configuration names, with this code or else that of the folder it names.

        UserError if the name is unknown, or the folder cannot be used.
        """
        if code is None and settings.code is not None:
            code = pack(settings.code)
        made = cls(settings.name, settings.normalization, settings.embedding, code, settings.activation)
        made._find()
        return made

    @classmethod
    def described(cls, facts: Mapping[str, Any], folder: Path) -> Self:
        """The architecture that the `facts` in a folder describe."""
        code = pack(str(folder / facts["code"])) if facts.get("code") else None
        activation = facts.get("activation", "default")
        return cls(facts["architecture"], facts["normalization"], facts.get("embedding"), code, activation)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the code to a folder; returns what `described` reads, for JSON."""
        facts: dict[str, Any] = {"architecture": self.name, "normalization": self.normalization}
        if self.embedding is not None:
            facts["embedding"] = self.embedding
        if self.activation != "default":
            facts["activation"] = self.activation
        if self.code is not None:
            facts["code"] = _CODE
            unpack(self.code, folder / _CODE)
        return facts

    @property
    def code_sha256(self) -> str | None:
        """SHA-256 of the code's names and contents."""
        return None if self.code is None else hashlib.sha256(self.code).hexdigest()

    def requirements(self) -> list[str]:
        """What to install to build it, pinned, beside what this package's networks need; ConfigError if unknown."""
        if self.name.startswith(TIMM):
            return [f"timm=={importlib.metadata.version('timm')}"]
        if not self._is_foreign:
            return []
        return [distribution(self.name)] if self.code is None else code_requirements(self.code)

    def build(self, num_classes: int, image_shape: ImageShape) -> ImageClassifier:
        """Builds the network with fresh weights, drawn from torch's global generator, in training mode.

        UserError if the name, the layer or the normalization is unknown, or the network does not take these images, or
        has no other activation.
        """
        network = self._find()
        _check_shape(self.name, network, image_shape)
        first = _build_normalization(self.normalization, network, image_shape[0])
        if network.foreign:
            whole = network.build(num_classes, image_shape)
            built = wrap(self.name, whole, first, num_classes, image_shape, self.embedding)
        else:
            shape = {"image_shape": image_shape} if network.one_size else {"in_channels": image_shape[0]}
            built = network.build(num_classes=num_classes, normalization=first, **shape)
        if self.activation != "default":
            if not hasattr(built, "activation"):
                reason = f"the activations of {self.name} are fixed"
                remedy = "leave it out, or use wrn_*, preact_resnet_18, cifar_cnn*, small_cnn or digits_cnn"
                raise ConfigError("model.activation", self.activation, reason, remedy)
            for module in built.modules():
                if hasattr(module, "activation"):
                    setattr(module, "activation", _ACTIVATIONS[self.activation])  # noqa: B010 - mypy takes it for a module
        if self.embedding is not None:
            take_embedding(built, self.embedding, image_shape)
        return built

    @property
    def _is_foreign(self) -> bool:
        return is_factory(self.name) and not self.name.startswith((TIMM, TORCHVISION))

    def _find(self) -> _Network:
        name = self.name
        if name in _NETWORKS:
            return _NETWORKS[name]
        if name.startswith(TIMM):
            return _Network(partial(build_timm, name), timm_normalization(name), foreign=True)
        if self._is_foreign:
            return _Network(partial(call_factory, name, code=self.code), foreign=True)
        if name in torchvision_names():
            return _Network(partial(build_torchvision, name), "imagenet", foreign=True)
        candidates = (*model_names(), *torchvision_names())
        matches = [TORCHVISION + name] if TORCHVISION + name in candidates else get_close_matches(name, candidates, n=1)
        hint = f"did you mean {matches[0]}? " if matches else ""
        known = f"known are {', '.join(model_names())}, torchvision:NAME, timm:NAME and package.module:factory"
        raise ConfigError("model.name", name, "there is no such network", hint + known)


def model_names() -> tuple[str, ...]:
    """Names of this project's own networks."""
    return tuple(_NETWORKS)


def build_model(
    name: str, num_classes: int, image_shape: ImageShape, normalization: str = "default"
) -> ImageClassifier:
    """Builds a network by its name alone: see :meth:`Architecture.build`.

    ``name`` is one of :func:`model_names`, ``torchvision:NAME``, ``timm:NAME`` or an installed factory; ``image_shape``
    is (C, H, W); the normalization is ``default``, ``none``, ``per_image``, ``cifar10`` or ``imagenet``. ``default`` is
    the network's own: its paper's, or ``none`` where that has three channels and the images another number.
    """
    return Architecture(name, normalization).build(num_classes, image_shape)


def normalization_with(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """Name of the normalization with these statistics per channel, to within 0.001; None if there is none."""
    if len(mean) != 3 or len(std) != 3:
        return None
    given = torch.tensor([mean, std])
    known = _CHANNEL_STATISTICS.items()
    return next((name for name, pair in known if torch.allclose(torch.tensor(pair), given, 0, 1e-3)), None)


def normalization_of(network: nn.Module) -> str:
    """Name of a network's normalization; ``default`` if only the network itself, one of timm, has it."""
    first = getattr(network, "normalization", None)
    if isinstance(first, ChannelNormalization):
        mean, std = first.mean.flatten().tolist(), first.std.flatten().tolist()
        return normalization_with(mean, std) or "default"
    return "per_image" if isinstance(first, PerImageStandardization) else "none"


def activation_of(network: nn.Module) -> str:
    """Name of a network's activation; ``default`` if it is fixed, or the leaky ReLU of wrn_32_10."""
    return next(
        (name for name, each in _ACTIVATIONS.items() if getattr(network, "activation", None) is each), "default"
    )


def _check_shape(name: str, network: _Network, image_shape: ImageShape) -> None:
    channels, height, width = image_shape
    refused = f"it cannot take {channels}x{height}x{width} images"
    if channels < 1 or min(height, width) < network.min_size:
        reason = f"{refused}: it needs at least {network.min_size}x{network.min_size} pixels"
        remedy = "choose larger images or another network, for example mnist_mlp, which takes any size"
        raise ConfigError("model.name", name, reason, remedy)
    if height % network.size_multiple or width % network.size_multiple:
        reason = f"{refused}: height and width must be multiples of {network.size_multiple}"
        remedy = "resize the images or choose another network, for example wrn_28_10, which takes any size"
        raise ConfigError("model.name", name, reason, remedy)


def _build_normalization(choice: str, network: _Network, channels: int) -> nn.Module:
    if choice not in _NORMALIZATIONS:
        remedy = f"choose from {', '.join(_NORMALIZATIONS)}"
        raise ConfigError("model.normalization", choice, "there is no such normalization", remedy)
    resolved = network.normalization if choice == "default" else choice
    if resolved == "per_image":
        return PerImageStandardization()
    if isinstance(resolved, str) and resolved not in _CHANNEL_STATISTICS:
        return nn.Identity()
    mean, std = _CHANNEL_STATISTICS[resolved] if isinstance(resolved, str) else resolved
    if channels == len(mean):
        return ChannelNormalization(mean, std)
    if choice == "default":
        return nn.Identity()
    reason = f"it has {len(mean)} channels and the images have {channels}"
    raise ConfigError("model.normalization", choice, reason, "choose none or per_image")
