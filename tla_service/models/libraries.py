"""Classifiers of torchvision and timm, which are slow to import: only when asked for."""

from difflib import get_close_matches
from typing import Any

from torch import nn

from tla_service.errors import ConfigError, UnavailableError, one_line
from tla_service.pixels import ImageShape

TORCHVISION, TIMM = "torchvision:", "timm:"


def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's image classifiers, with the prefix ``torchvision:``."""
    from torchvision import models

    return tuple(TORCHVISION + name for name in models.list_models(module=models))


def build_torchvision(name: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """Builds one of :func:`torchvision_names` with fresh weights; nothing is downloaded.

    For a number of channels other than 3 the first convolution is replaced.
    """
    from torchvision import models

    channels, height, width = image_shape
    bare_name = name.removeprefix(TORCHVISION)
    extra = _extra_arguments(bare_name, height, width)
    try:
        network: nn.Module = models.get_model(bare_name, weights=None, num_classes=num_classes, **extra)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise size_error(name, image_shape, error) from error
    if channels != 3:
        path, old = next((path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d))
        geometry: dict[str, Any] = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding")}
        convolution = nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **geometry)
        network.set_submodule(path, convolution)
    return network


def _extra_arguments(name: str, height: int, width: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": height}
    if name.startswith("maxvit_"):
        return {"input_size": (height, width)}
    if name in {"googlenet", "inception_v3"}:
        # Their auxiliary heads would return more logits in training mode.
        return {"aux_logits": False, "transform_input": False, "init_weights": False}
    return {}


def timm_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that one of timm's networks expects; errors as for `build_timm`."""
    config = _timm_config(name)
    return tuple(config.mean), tuple(config.std)


def build_timm(name: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """Builds a network of timm with fresh weights; nothing is downloaded. ConfigError if timm has none of this name."""
    config = _timm_config(name)
    import timm

    channels, height, width = image_shape
    size: dict[str, Any] = {"img_size": (height, width)} if config.fixed_input_size else {}
    bare_name = name.removeprefix(TIMM)
    try:
        return timm.create_model(bare_name, pretrained=False, num_classes=num_classes, in_chans=channels, **size)
    except Exception as error:
        raise size_error(name, image_shape, error) from error


def _timm_config(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        remedy = "pip install 'tla-service[timm]'"
        raise UnavailableError("model.name", name, "the package timm is not installed", remedy) from error
    bare_name = name.removeprefix(TIMM)
    if not timm.is_model(bare_name):
        matches = get_close_matches(bare_name, timm.list_models(), n=1)
        hint = f"did you mean {TIMM}{matches[0]}?" if matches else "timm.list_models() lists them"
        raise ConfigError("model.name", name, f"timm {timm.__version__} has no such network", hint)
    # Some networks have no weights, and so no configuration.
    return timm.get_pretrained_cfg(bare_name) or timm.models.PretrainedCfg()


def size_error(name: str, image_shape: ImageShape, error: Exception) -> ConfigError:
    """A network that does not take images of this shape, with its own reason."""
    size = "x".join(str(length) for length in image_shape)
    cause = one_line(error) or type(error).__name__
    remedy = "choose other images (data.image_size), or a network for small ones such as preact_resnet_18"
    return ConfigError("model.name", name, f"it cannot take {size} images ({cause})", remedy)
