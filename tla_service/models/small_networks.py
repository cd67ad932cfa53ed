"""Small networks: CNNs for CPUs, and the paper's MNIST networks (Mao et al. 2019, Table 5)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tla_service.models.classifier import ImageClassifier
from tla_service.models.residual import Activation

_WIDTH = 1024
# What the authors' code returns: the second and the fourth BatchNorm, before the ReLU. That these are Table 10's lower
# and middle layers is our reading.
_CNN_LAYERS: Mapping[str, int] = {"lower": 4, "middle": 11}
_BATCH_NORM_EPS = 1e-3  # TensorFlow's default, which the authors' code leaves as it is; torch's is 1e-5


class _Activated(nn.Module):
    activation: Activation = staticmethod(F.relu)

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(features)


class ConvolutionOfImages(nn.Conv2d):
    """A convolution of few channels, fast under attack on CPUs.

    oneDNN takes three to four times as long for the gradient with respect to the images as a matrix product does.
    """

    def forward(self, images: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        if not (images.is_cpu and images.requires_grad):
            return super().forward(images)
        maps = super().forward(images.detach())
        result: Tensor = _ToImages.apply(maps, images, self.weight.detach().to(maps.dtype), self.stride, self.padding)
        return result


class _ToImages(torch.autograd.Function):
    """The maps of a convolution as they are; their gradient goes on to the images, overlapping patches summed."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = images.shape, stride, padding
        ctx.mark_dirty(maps)  # no view of them: an activation may work in place
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        patches = weight.flatten(1).t() @ gradient.flatten(2)
        images = F.fold(patches, ctx.shape[2:], weight.shape[2:], padding=ctx.padding, stride=ctx.stride)
        return gradient, images, None, None, None


class SmallCNN(ImageClassifier):
    """Square convolutions padded by one, each with ReLUs, then 128 ReLUs: the embedding (>= 0 with the default).

    Without BatchNorm, its default, an image's output and gradient do not depend on its batch. With two 4x4 convolutions
    (16, 32) of stride 2, the convolutions are those of Wong and Kolter 2018 (arXiv 1711.00851) for MNIST.
    """

    activation: Activation = staticmethod(F.relu)

    def __init__(
        self,
        widths: Sequence[int],
        kernel_size: int,
        strides: Sequence[int],
        *,
        batchnorm: bool = False,
        num_classes: int,
        image_shape: tuple[int, int, int],
        normalization: nn.Module,
    ) -> None:
        super().__init__(normalization)
        channels, *sides = image_shape
        self.convolutions = nn.Sequential()
        for width, stride in zip(widths, strides, strict=True):
            kind = ConvolutionOfImages if not self.convolutions and stride > 1 else nn.Conv2d
            norms = [nn.BatchNorm2d(width)] if batchnorm else []
            self.convolutions.extend([kind(channels, width, kernel_size, stride, padding=1), *norms, _Activated()])
            channels, sides = width, [(side + 2 - kernel_size) // stride + 1 for side in sides]
        self.hidden = nn.Linear(channels * sides[0] * sides[1], 128)
        self.fc = nn.Linear(128, num_classes)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 128)."""
        features: Tensor = self.convolutions(normalized)
        return self.activation(self.hidden(features.flatten(1)))


class MnistNetwork(ImageClassifier):
    """Hidden layers of BatchNorm and ReLU; the last, of 1024, is the embedding (>= 0).

    Convolution and linear weights start at N(0, 0.1^2) truncated at two sigma, biases at 0.1 (the authors' release).
    The body maps normalized images to embeddings; `layers` are named positions in it.
    """

    def __init__(
        self, body: nn.Sequential, num_classes: int, normalization: nn.Module, layers: Mapping[str, int]
    ) -> None:
        super().__init__(normalization)
        self.layers = layers
        self.body = body
        self.fc = nn.Linear(_WIDTH, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
                nn.init.constant_(module.get_parameter("bias"), 0.1)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 1024), non-negative."""
        return self.body(normalized)


def build_mnist_cnn(num_classes: int, image_shape: tuple[int, int, int], normalization: nn.Module) -> MnistNetwork:
    """3x3 convolutions 32, 64, pool, 128, 256, pool, then 1024: Mao et al. 2019, Table 5. H and W are at least 4."""
    channels, height, width = image_shape
    body = nn.Sequential(
        *_convolution(channels, 32),
        *_convolution(32, 64),
        nn.MaxPool2d(2),
        *_convolution(64, 128),
        *_convolution(128, 256),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *_hidden(256 * (height // 4) * (width // 4)),
    )
    return MnistNetwork(body, num_classes, normalization, _CNN_LAYERS)


def build_mnist_mlp(num_classes: int, image_shape: tuple[int, int, int], normalization: nn.Module) -> MnistNetwork:
    """Three hidden layers of 1024: what the authors' MNIST configuration selects; the paper's results are the CNN's."""
    channels, height, width = image_shape
    body = nn.Sequential(nn.Flatten(), *_hidden(channels * height * width), *_hidden(_WIDTH), *_hidden(_WIDTH))
    return MnistNetwork(body, num_classes, normalization, {})


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return convolution, nn.BatchNorm2d(out_channels, eps=_BATCH_NORM_EPS), nn.ReLU()


def _hidden(in_features: int) -> tuple[nn.Module, ...]:
    return nn.Linear(in_features, _WIDTH), nn.BatchNorm1d(_WIDTH, eps=_BATCH_NORM_EPS), nn.ReLU()
