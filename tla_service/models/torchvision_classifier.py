"""torchvision's classifiers, split into body and linear layer; torchvision, slow to import, only when asked for."""

from typing import Any

import torch
from torch import Tensor, nn

from tla_service.errors import ConfigError
from tla_service.models.classifier import ImageClassifier

TORCHVISION_PREFIX = "torchvision:"


class TorchvisionClassifier(ImageClassifier):
    """A body, which maps normalized images to (N, D) or (N, D, 1, 1), and a linear layer, torchvision's ``head``.

    Where torchvision has dropout before the linear layer, it applies to the embeddings in training mode too.
    """

    def __init__(self, body: nn.Module, fc: nn.Linear, normalization: nn.Module, head: str) -> None:
        super().__init__(normalization)
        self.body = body
        self.fc = fc
        self._head = head

    def published_names(self) -> dict[str, str]:
        """As torchvision names them."""
        ours = {name: name.removeprefix("body.") for name in self.state_dict()}
        return ours | {f"fc.{part}": f"{self._head}.{part}" for part in self.fc.state_dict()}

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, D)."""
        return self.body(normalized).flatten(1)


def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's image classifiers, with the prefix ``torchvision:``."""
    from torchvision import models

    return tuple(TORCHVISION_PREFIX + name for name in models.list_models(module=models))


def build_torchvision(
    name: str, num_classes: int, image_shape: tuple[int, int, int], normalization: nn.Module
) -> TorchvisionClassifier:
    """Builds one of :func:`torchvision_names` with fresh weights; nothing is downloaded.

    For a number of channels other than 3 the first convolution is replaced.
    """
    from torchvision import models

    channels, height, width = image_shape
    bare_name = name.removeprefix(TORCHVISION_PREFIX)
    extra = _extra_arguments(bare_name, height, width)
    try:
        body = models.get_model(bare_name, weights=None, num_classes=num_classes, **extra)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _shape_error(name, image_shape, error) from error
    fc, head = _detach_classifier(name, body, num_classes)
    if channels != 3:
        path, old = next((path, module) for path, module in body.named_modules() if isinstance(module, nn.Conv2d))
        geometry: dict[str, Any] = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding")}
        convolution = nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **geometry)
        body.set_submodule(path, convolution)
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
