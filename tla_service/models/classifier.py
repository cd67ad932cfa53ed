"""The structure that all networks share: normalize, embed, classify linearly."""

import math
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tla_service.errors import ConfigError


class ModelOutput(NamedTuple):
    """Logits (N, K) and embeddings (N, D), the final linear layer's input: ``h`` in Mao et al. 2019, section 4."""

    logits: Tensor
    embeddings: Tensor


class PerImageStandardization(nn.Module):
    """Each image minus its mean, over its standard deviation: TensorFlow's ``per_image_standardization``.

    Over all channels and pixels of one image: ``(x - mean) / max(std, 1 / sqrt(num_values))``. The lower bound is in
    the units that TensorFlow sees, and the paper's networks feed it pixels in [0, 255]; so for images in [0, 1] it is
    divided by 255. It matters for almost constant images only.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Standardizes images (N, C, H, W) in [0, 1]; same shape, mean 0 per image."""
        smallest_std = 1.0 / (255.0 * math.sqrt(images.shape[1:].numel()))
        centered = images - images.mean(dim=(1, 2, 3), keepdim=True)
        variance = centered.square().mean(dim=(1, 2, 3), keepdim=True)
        # The bound goes on before the root: the root's slope at 0 is infinite, and a constant image would give NaN.
        return centered / variance.clamp_min(smallest_std**2).sqrt()


class ChannelNormalization(nn.Module):
    """Fixed ``(x - mean) / std`` per channel, both for pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Constants of the architecture, not weights: left out of the state dict, whose names then match the
        # published checkpoints' names one to one.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalizes images (N, C, H, W) in [0, 1]; same shape."""
        return (images - self.mean) / self.std


class ImageClassifier(nn.Module):
    """Base class of all networks. A subclass defines :meth:`embed` and has its final linear layer as ``fc``.

    The normalization is applied to the images inside the network, so that attacks differentiate through it and their
    budgets stay in [0, 1] pixels.
    """

    fc: nn.Linear
    layers: Mapping[str, int] = MappingProxyType({})
    """Named hidden layers, as positions in the network's `body`, a Sequential that embeds."""
    tap: "Tap | None" = None
    """Where the embeddings come from, if not from the input of the final linear layer."""
    found: str = ""
    """In words, where a network of others has its embeddings."""

    def __init__(self, normalization: nn.Module) -> None:
        super().__init__()
        self.normalization = normalization

    @property
    def classifier(self) -> nn.Linear:
        """The final linear layer, (N, D) to (N, K)."""
        return self.fc

    @property
    def embedding_size(self) -> int:
        """D, the size of the embeddings."""
        return self.classifier.in_features if self.tap is None else self.tap.size

    def published_names(self) -> dict[str, str]:
        """Names of the network's tensors -> names in the files that its authors publish."""
        return {name: name for name in self.state_dict()}

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps normalized images (N, C, H, W) to embeddings (N, D)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> ModelOutput:
        """Classifies images (N, C, H, W), floating point, in [0, 1]; ``logits == classifier(embeddings)``, untapped."""
        embeddings = self.embed(self.normalization(images))
        logits = self.classifier(embeddings)
        return ModelOutput(logits, embeddings if self.tap is None else self.tap.take())


class Tap:
    """A forward hook that keeps the output of a module as embeddings (N, D), until the network returns them.

    Of each thread its own. A copy of the network has its own tap, on its own module.
    """

    def __init__(self, output: Tensor) -> None:
        self._dimensions = output.ndim  # fixed, so that the network can be traced
        self.size = self._pooled(output).shape[1]
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the output (N, ...)."""
        self._outputs[self._caller()] = self._pooled(output)

    def take(self) -> Tensor:
        """The embeddings of the images that the network saw last."""
        return self._outputs.pop(self._caller())

    @staticmethod
    def _caller() -> int:
        # torch.compile cannot trace the question for the thread.
        return 0 if torch.compiler.is_compiling() else threading.get_ident()

    def _pooled(self, output: Tensor) -> Tensor:
        """Maps (N, C, H, W) are averaged over space, tokens (N, T, D) over the tokens."""
        if self._dimensions == 3:
            return output.mean(1)
        # A copy, since the next layer may work in place.
        return output.flatten(2).mean(2) if self._dimensions > 3 else output.clone()


class LogitsOnly(nn.Module):
    """A network that returns logits alone, as attack toolboxes and RobustBench expect; shared, not copied."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        return self.classifier(images).logits


class AtLayer(nn.Module):
    """A network whose embeddings are taken from another layer, flattened (Mao et al. 2019, Table 10).

    The layer is `logits`, or one of the network's :attr:`~ImageClassifier.layers`; else ConfigError is raised.
    """

    def __init__(self, classifier: ImageClassifier, layer: str) -> None:
        super().__init__()
        if layer != "logits" and layer not in classifier.layers:
            reason = f"{type(classifier).__name__} has no layer of this name"
            raise ConfigError("loss.triplet_layer", layer, reason, "take embedding or logits, or model.name mnist_cnn")
        self.classifier, self.layer = classifier, layer

    def forward(self, images: Tensor) -> ModelOutput:
        """Logits (N, K) of images (N, C, H, W) in [0, 1], and the layer's activations (N, D)."""
        if self.layer == "logits":
            logits: Tensor = self.classifier(images).logits
            return ModelOutput(logits=logits, embeddings=logits)
        body: Any = self.classifier.body
        hidden = activations = self.classifier.normalization(images)
        for position, module in enumerate(body):
            hidden = module(hidden)
            if position == self.classifier.layers[self.layer]:
                activations = hidden
        return ModelOutput(logits=self.classifier.classifier(hidden), embeddings=activations.flatten(1))


def seen_by_triplets(classifier: ImageClassifier, layer: str) -> nn.Module:
    """The network as the triplet term sees it: itself, or an :class:`AtLayer`."""
    return classifier if layer == "embedding" else AtLayer(classifier, layer)
