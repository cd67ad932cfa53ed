"""TensorFlow's SAME padding, which the paper's networks use. With a stride it is lopsided, unlike torch's padding."""

import math

from torch import Tensor, nn
from torch.nn import functional as F


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis, so that it comes out at ``ceil(size / stride)``; the odd one goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def _pad(images: Tensor, kernel_size: int, stride: int, value: float) -> Tensor:
    top, bottom = same_padding(images.shape[2], kernel_size, stride)
    left, right = same_padding(images.shape[3], kernel_size, stride)
    return F.pad(images, (left, right, top, bottom), value=value)


class SameConv2d(nn.Conv2d):
    """A square convolution without bias, of odd size, padded as TensorFlow's SAME: out comes (N, C', H / s, W / s).

    The lengths are rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        # Without a stride the padding is even, and the convolution does it itself without a copy of its input.
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is torch's
        """Pads and convolves (N, C, H, W)."""
        if self.stride[0] == 1:
            return super().forward(input)
        return super().forward(_pad(input, self.kernel_size[0], self.stride[0], 0.0))


class SameMaxPool2d(nn.Module):
    """A square max-pool padded as TensorFlow's SAME; padding never wins."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, images: Tensor) -> Tensor:
        """Pools (N, C, H, W) to (N, C, ceil(H / s), ceil(W / s))."""
        return F.max_pool2d(_pad(images, self.kernel_size, self.stride, -math.inf), self.kernel_size, self.stride)
