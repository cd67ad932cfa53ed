"""What the residual networks share: the pre-activation block, initial weights, TensorFlow's lopsided SAME padding."""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


class PreActivationBlock(nn.Module):
    """BatchNorm, activation, convolution, two or three times, plus a shortcut (He et al. 2016, arXiv 1603.05027).

    The shortcut is the input, or the projection of its activation, which state dicts know as ``projection_name``.
    """

    conv1: nn.Conv2d
    activation: Activation = staticmethod(F.relu)

    def __init__(
        self,
        *convolutions: nn.Conv2d,
        projection: nn.Module | None = None,
        projection_name: str = "projection",
        batch_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.depth, self.projection_name = len(convolutions), projection_name
        for number, convolution in enumerate(convolutions, start=1):
            self.add_module(f"bn{number}", nn.BatchNorm2d(convolution.in_channels, eps=batch_norm_eps))
            self.add_module(f"conv{number}", convolution)
        self.add_module(projection_name, projection)

    def shortcut_of(self, block_input: Tensor, activated: Tensor) -> Tensor:
        """What is added to the residual branch; ``activated`` is the input after the first BatchNorm and activation."""
        projection: nn.Module | None = getattr(self, self.projection_name)
        return block_input if projection is None else projection(activated)

    def forward(self, block_input: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C', H', W')."""
        activated = self._activated(1, block_input)
        residual: Tensor = self.conv1(activated)
        for number in range(2, self.depth + 1):
            residual = getattr(self, f"conv{number}")(self._activated(number, residual))
        return residual + self.shortcut_of(block_input, activated)

    def _activated(self, number: int, inputs: Tensor) -> Tensor:
        return self.activation(getattr(self, f"bn{number}")(inputs))


def initialize(network: nn.Module, linear: nn.Linear) -> None:
    """As `initialize_convolutions`; the linear layer uniformly with variance 1 / in_features (TensorFlow), biases 0."""
    initialize_convolutions(network)
    bound = math.sqrt(3.0 / linear.in_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def initialize_convolutions(network: nn.Module) -> None:
    """Draws every convolution's weights from N(0, 2 / (k^2 * out_channels)) (He et al. 2015, by outputs)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis, so that it comes out at ``ceil(size / stride)``; the odd one goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def _pad(images: Tensor, kernel_size: int, stride: int, value: float) -> Tensor:
    vertical, horizontal = (same_padding(size, kernel_size, stride) for size in images.shape[2:])
    return F.pad(images, (*horizontal, *vertical), value=value)


class SameConv2d(nn.Conv2d):
    """A square convolution of odd size without bias, padded as TensorFlow's SAME to ceil(H / s), ceil(W / s)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        # Without a stride the padding is even, and the convolution does it itself without a copy of its input.
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is torch's
        """Pads and convolves (N, C, H, W)."""
        stride = self.stride[0]
        return super().forward(input if stride == 1 else _pad(input, self.kernel_size[0], stride, 0.0))


class SameMaxPool2d(nn.Module):
    """A square max-pool padded as TensorFlow's SAME; padding never wins."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, images: Tensor) -> Tensor:
        """Pools (N, C, H, W) to (N, C, ceil(H / s), ceil(W / s))."""
        return F.max_pool2d(_pad(images, self.kernel_size, self.stride, -math.inf), self.kernel_size, self.stride)
