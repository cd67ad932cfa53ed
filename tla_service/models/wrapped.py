"""Networks of others as image classifiers: their linear head found by running it, or a layer named as the embedding."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tla_service.errors import ConfigError
from tla_service.models.classifier import ImageClassifier, Tap
from tla_service.models.libraries import TIMM, TORCHVISION, size_error
from tla_service.models.own_code import where
from tla_service.pixels import ImageShape

_TOLERANCE = 1e-4  # of the largest logit: where tokens are averaged after the head, the sums are in another order
_SHOWN = 6


class WrappedClassifier(ImageClassifier):
    """A body, which maps normalized images to (N, D), and the linear layer that was its ``head``.

    Where dropout precedes the linear layer, it applies to the embeddings in training mode too. Without a head (its name
    is empty) the body returns logits, and the embeddings are those of a named layer.
    """

    def __init__(self, body: nn.Module, fc: nn.Module, normalization: nn.Module, head: str, shape: ImageShape) -> None:
        super().__init__(normalization)
        self.body = body
        self.fc = fc  # type: ignore[assignment]
        self.head, self.image_shape = head, shape

    def published_names(self) -> dict[str, str]:
        """As the network's authors name them."""
        ours = {name: name.removeprefix("body.") for name in self.state_dict()}
        return ours | {f"fc.{part}": f"{self.head}.{part}" for part in self.fc.state_dict()}

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, D); without a head, to logits."""
        return self.body(normalized).flatten(1)


class _NoHead(nn.Identity):
    """In place of a linear head: the body returns the logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.in_features = self.out_features = num_classes


def noise(image_shape: ImageShape) -> Tensor:
    """Two images (2, C, H, W) in [0, 1) that look like noise; no random draw, and the same everywhere."""
    size = torch.Size((2, *image_shape))
    return torch.arange(1, size.numel() + 1, dtype=torch.float64).mul(0.6180339887).frac().float().view(size)


def wrap(
    name: str,
    network: nn.Module,
    normalization: nn.Module,
    num_classes: int,
    image_shape: ImageShape,
    embedding: str | None,
) -> WrappedClassifier:
    """Split a network that returns logits (N, K) into body and linear head, by running it on two images.

    The head is the last linear layer that ran, if the network's output is its output. ConfigError if the network does
    not take such images, returns something else or, without `embedding`, has no such layer.
    """
    images = normalization(noise(image_shape))
    ran, output = _run(name, network, images, image_shape)
    _check_logits(name, output, num_classes)
    head = next((path for path in reversed(ran) if isinstance(network.get_submodule(path), nn.Linear)), "")
    if embedding is not None and f"{head}.".startswith(f"{embedding}."):
        head = ""  # the embeddings asked for are the logits
    fc = _take_out(network, head, images) if head else None
    if fc is None and embedding is None:
        reason = "its logits are not the output of a linear layer, so it has no penultimate embedding"
        remedy = f"set model.embedding to a layer, such as {_listed(ran)}"
        raise ConfigError("model.name", name, reason, remedy)
    if fc is None:
        return WrappedClassifier(network, _NoHead(num_classes), normalization, "", image_shape).train()
    wrapped = WrappedClassifier(network, fc, normalization, head, image_shape)
    wrapped.found = f"input of {head}, {fc.in_features} numbers"
    return wrapped.train()


def take_embedding(network: ImageClassifier, layer: str, image_shape: ImageShape) -> None:
    """Let a network's embeddings be the output of a layer by its name, averaged if it is a map; ConfigError if none."""
    # The module whose submodules have the names that users know.
    named = network.body if isinstance(network, WrappedClassifier) else network
    training = network.training
    ran, _ = _run("", network, noise(image_shape), image_shape, named)
    network.train(training)
    output = ran.get(layer)
    if output is None:
        raise ConfigError("model.embedding", layer, "no layer of this name returned a tensor", f"choose {_listed(ran)}")
    network.tap = Tap(output)
    named.get_submodule(layer).register_forward_hook(network.tap)
    network.found = f"output of {layer}, {network.tap.size} numbers"


def _run(
    name: str, network: nn.Module, images: Tensor, image_shape: ImageShape, named: nn.Module | None = None
) -> tuple[dict[str, Tensor], Any]:
    """Output in eval mode, and of each module that ran and returned a tensor (N, ...), by name in order, its own."""
    ran: dict[str, Tensor] = {}

    def keep(path: str, _module: nn.Module, _inputs: object, output: object) -> None:
        ran.pop(path, None)
        if isinstance(output, Tensor) and output.ndim > 1 and len(output) == len(images):
            ran[path] = output

    network.eval()
    parts = (named or network).named_modules()
    hooks = [module.register_forward_hook(partial(keep, path)) for path, module in parts if path]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return ran, network(images.clone())
    except Exception as error:
        if name.startswith((TIMM, TORCHVISION)):
            raise size_error(name, image_shape, error) from error
        reason = f"fails on {'x'.join(map(str, image_shape))} images ({where(error)})"
        remedy = "correct its forward method, or choose other images (data.image_size)"
        raise ConfigError("model.name", name, reason, remedy) from error
    finally:
        for hook in hooks:
            hook.remove()


def _check_logits(name: str, output: Any, num_classes: int) -> None:
    remedy = f"return one tensor of logits (N, {num_classes})"
    if not isinstance(output, Tensor):
        raise ConfigError("model.name", name, f"the network returns {type(output).__name__}", remedy)
    if output.shape != (2, num_classes):
        shape = f"it maps 2 images of {num_classes} classes to a tensor of shape {tuple(output.shape)}"
        raise ConfigError("model.name", name, shape, remedy)
    if not output.is_floating_point():
        reason = f"the network returns {str(output.dtype).removeprefix('torch.')} numbers, such as predicted classes"
        raise ConfigError("model.name", name, reason, remedy)


def _take_out(network: nn.Module, path: str, images: Tensor) -> nn.Linear | None:
    """Replace the linear layer by what passes its input through; None, with it back, if that changes the logits.

    Those of another layer in its place, since weights of zero would hide what follows them. And with other scales and
    shifts, of which a new network has 1 and 0 where a trained one has not.
    """
    fc = network.get_submodule(path)
    assert isinstance(fc, nn.Linear)
    scales = {each: each.clone() for each in network.parameters() if each.shape in ((), (1,), (fc.out_features,))}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial = nn.Linear(fc.in_features, fc.out_features, device=fc.weight.device, dtype=fc.weight.dtype)
            network.set_submodule(path, trial)
            for each in scales:
                each.add_(0.1)
            logits = network(images.clone())
            network.set_submodule(path, nn.Identity())
            embeddings = network(images.clone()).flatten(1)
            found = trial(embeddings)
        fits = embeddings.shape == (2, fc.in_features) and found.shape == logits.shape
        if fits and (found.is_meta or (found - logits).abs().max() <= _TOLERANCE * logits.abs().max()):
            return fc
    except Exception:  # noqa: BLE001 - the network may need what it no longer has
        pass
    finally:
        with torch.no_grad():
            for each, value in scales.items():
                each.copy_(value)
    network.set_submodule(path, fc)
    return None


def _listed(ran: dict[str, Tensor]) -> str:
    """The last layers near the top, with the shape of their output per image."""
    near = [path for path in ran if path.count(".") < 2][-_SHOWN:]
    return ", ".join(f"{path} ({'x'.join(map(str, ran[path].shape[1:]))})" for path in near)
