"""What the residual networks share: the pre-activation block and initial weights."""

import math

from torch import Tensor, nn
from torch.nn import functional as F


class PreActivationBlock(nn.Module):
    """BatchNorm, activation, convolution, two or three times, plus a shortcut (He et al. 2016, arXiv 1603.05027).

    A subclass defines in :meth:`shortcut_of` what is added.

    Args:
        conv1: First convolution; it has the stride.
        conv2: Second convolution.
        conv3: Third convolution of a bottleneck, or ``None``.
        negative_slope: Of the leaky ReLU; 0 is the plain ReLU.
        batch_norm_eps: Added to the variance by every BatchNorm of the block.
    """

    def __init__(
        self,
        conv1: nn.Conv2d,
        conv2: nn.Conv2d,
        conv3: nn.Conv2d | None = None,
        *,
        negative_slope: float = 0.0,
        batch_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.bn1 = nn.BatchNorm2d(conv1.in_channels, eps=batch_norm_eps)
        self.conv1 = conv1
        self.bn2 = nn.BatchNorm2d(conv2.in_channels, eps=batch_norm_eps)
        self.conv2 = conv2
        self.bn3 = None if conv3 is None else nn.BatchNorm2d(conv3.in_channels, eps=batch_norm_eps)
        self.conv3 = conv3

    def shortcut_of(self, block_input: Tensor, activated: Tensor) -> Tensor:
        """What is added to the residual branch, (N, C', H', W').

        Args:
            block_input: (N, C, H, W).
            activated: (N, C, H, W), the same after the first BatchNorm and activation.
        """
        raise NotImplementedError

    def forward(self, block_input: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C', H', W')."""
        activated = self._activate(self.bn1(block_input))
        residual: Tensor = self.conv1(activated)
        residual = self.conv2(self._activate(self.bn2(residual)))
        if self.conv3 is not None and self.bn3 is not None:
            residual = self.conv3(self._activate(self.bn3(residual)))
        return residual + self.shortcut_of(block_input, activated)

    def _activate(self, inputs: Tensor) -> Tensor:
        return F.leaky_relu(inputs, self.negative_slope) if self.negative_slope else F.relu(inputs)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias, padded by one on every side."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def initialize_convolutions(network: nn.Module) -> None:
    """Draws every convolution's weights from N(0, 2 / (k^2 * out_channels)) (He et al. 2015, by outputs)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def initialize_linear_uniform(linear: nn.Linear) -> None:
    """Draws weights uniformly with variance 1 / in_features, biases 0: TensorFlow's uniform variance scaling."""
    bound = math.sqrt(3.0 / linear.in_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)
