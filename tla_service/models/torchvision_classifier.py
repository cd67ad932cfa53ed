"""torchvision's classifiers, split into a body that embeds and the linear layer that classifies.

torchvision takes seconds to import, so it is imported only when one of its networks is asked for.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tla_service.errors import ConfigError
from tla_service.models.classifier import ImageClassifier

TORCHVISION_PREFIX = "torchvision:"
_RGB = 3


class TorchvisionClassifier(ImageClassifier):
    """A body and a linear layer.

    Where torchvision has dropout before the linear layer, it applies to the embeddings in training mode too.

    Args:
        body: Maps normalized images to (N, D), or to (N, D, 1, 1).
        fc: The linear layer, D to K.
        normalization: torchvision's recipes use ImageNet's mean and standard deviation.
        head: torchvision's name of the linear layer.
    """

    def __init__(self, body: nn.Module, fc: nn.Linear, normalization: nn.Module, head: str = "fc") -> None:
        super().__init__(normalization)
        self.body = body
        self.fc = fc
        self._head = head

    def published_names(self) -> dict[str, str]:
        """As torchvision names them."""
        return {
            name: f"{self._head}.{name.removeprefix('fc.')}" if name.startswith("fc.") else name.removeprefix("body.")
            for name in self.state_dict()
        }

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, D)."""
        return self.body(normalized).flatten(1)


def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's image classifiers, with the prefix ``torchvision:``."""
    from torchvision import models

    return tuple(TORCHVISION_PREFIX + name for name in models.list_models(module=models))


def build_torchvision_classifier(
    name: str, num_classes: int, image_shape: tuple[int, int, int], normalization: nn.Module
) -> TorchvisionClassifier:
    """Builds one of :func:`torchvision_names` with fresh weights; nothing is downloaded.

    For a number of channels other than 3 the first convolution is replaced.

    Raises:
        ConfigError: The network cannot take this image shape, or does not end in a linear layer.
    """
    from torchvision import models

    channels, height, width = image_shape
    bare_name = name.removeprefix(TORCHVISION_PREFIX)
    try:
        body = models.get_model(
            bare_name, weights=None, num_classes=num_classes, **_extra_arguments(bare_name, height, width)
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _shape_error(name, image_shape, error) from error
    fc, head = _detach_classifier(name, body, num_classes)
    if channels != _RGB:
        _replace_first_convolution(body, channels)
    _check_embedding(name, body, fc, image_shape)
    return TorchvisionClassifier(body, fc, normalization, head)


def _extra_arguments(name: str, height: int, width: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": height}
    if name.startswith("maxvit_"):
        return {"input_size": (height, width)}
    if name in {"googlenet", "inception_v3"}:
        # Their auxiliary heads would return more logits in training mode.
        return {"aux_logits": False, "transform_input": False, "init_weights": False}
    return {}


def _detach_classifier(name: str, body: nn.Module, num_classes: int) -> tuple[nn.Linear, str]:
    """Takes the last linear layer, with its name, out of the body, which then returns that layer's input."""
    linears = [(path, module) for path, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears[-1][1].out_features != num_classes:
        reason = "its logits do not come from a linear layer, so it has no penultimate embedding"
        remedy = "choose a network that ends in a linear layer, for example torchvision:resnet18"
        raise ConfigError("model.name", name, reason, remedy)
    path, fc = linears[-1]
    body.set_submodule(path, nn.Identity())
    return fc, path


def _replace_first_convolution(body: nn.Module, channels: int) -> None:
    path, old = next((path, module) for path, module in body.named_modules() if isinstance(module, nn.Conv2d))
    geometry: dict[str, Any] = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding")}
    geometry["bias"] = old.bias is not None
    body.set_submodule(path, nn.Conv2d(channels, old.out_channels, **geometry))


def _check_embedding(name: str, body: nn.Module, fc: nn.Linear, image_shape: tuple[int, int, int]) -> None:
    """Runs one blank image: torchvision has no other way to ask for the smallest image."""
    body.eval()
    try:
        with torch.no_grad():
            embeddings = body(torch.zeros(1, *image_shape)).flatten(1)
            shape = tuple(embeddings.shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _shape_error(name, image_shape, error) from error
    body.train()
    if shape != (1, fc.in_features):
        reason = f"its last linear layer takes {fc.in_features} numbers per image, but the body gives {shape[1:]}"
        raise ConfigError("model.name", name, reason, "choose another network, for example torchvision:resnet18")


def _shape_error(name: str, image_shape: tuple[int, int, int], error: Exception) -> ConfigError:
    size = "x".join(str(length) for length in image_shape)
    cause = str(error).strip().partition("\n")[0] or type(error).__name__
    remedy = "choose larger images, or a network for small ones such as preact_resnet_18"
    return ConfigError("model.name", name, f"it cannot take {size} images ({cause})", remedy)
