"""Initial weights that differ from torch's own."""

import math

from torch import nn


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


def initialize_truncated_normal(network: nn.Module) -> None:
    """Draws all convolution and linear weights from N(0, 0.1^2) cut off at two sigma; all their biases are 0.1.

    The MNIST networks of the authors' release start so.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.1)
