"""Wide residual networks: Madry et al.'s, which the paper uses on CIFAR-10, and the standard one of TRADES."""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from tla_service.models.classifier import ImageClassifier
from tla_service.models.residual import (
    PreActivationBlock,
    conv1x1,
    conv3x3,
    initialize_convolutions,
    initialize_linear_uniform,
)
from tla_service.models.same_padding import SameConv2d

_STEM_WIDTH = 16
_STRIDES = (1, 2, 2)


class MadryBlock(PreActivationBlock):
    """Two 3x3 convolutions with leaky ReLUs; a wider output gets the input average-pooled and padded with channels.

    Half of the zeros go before and half after, so the numbers of channels are both even or both odd. With
    ``activate_before_residual`` (first block only) the shortcut starts after the first BatchNorm and activation.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, activate_before_residual: bool = False
    ) -> None:
        super().__init__(
            SameConv2d(in_channels, out_channels, 3, stride),
            SameConv2d(out_channels, out_channels, 3),
            negative_slope=0.1,
            batch_norm_eps=1e-3,
        )
        self.stride = stride
        self.padded_channels = (out_channels - in_channels) // 2
        self.activate_before_residual = activate_before_residual

    def shortcut_of(self, block_input: Tensor, activated: Tensor) -> Tensor:
        """The input, or its activation, pooled and zero-padded to the block's output shape."""
        shortcut = activated if self.activate_before_residual else block_input
        if self.stride > 1:
            shortcut = F.avg_pool2d(shortcut, self.stride)
        if self.padded_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.padded_channels, self.padded_channels))
        return shortcut


class MadryWideResNet(ImageClassifier):
    """Madry et al. 2018's wide ResNet for CIFAR-10, as in the paper's authors' release ("w32-10": 5 blocks per group).

    The embedding comes from a leaky ReLU averaged over the image, so it may be negative. The paper's Table 6 prints 6
    blocks per group; the released code has 5, and this follows the code.

    Args:
        depth: 6 * blocks + 2; 32 in the paper.
        width: Factor on the groups' 16, 32 and 64 channels; 10 in the paper.
        num_classes: K.
        in_channels: C.
        normalization: The paper standardizes each image.

    Raises:
        ValueError: The depth is not 6n + 2, or less than 8.
    """

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int, normalization: nn.Module) -> None:
        super().__init__(normalization)
        blocks_per_group, rest = divmod(depth - 2, 6)
        if rest or blocks_per_group < 1:
            raise ValueError(f"depth {depth} is not 6n + 2 with n >= 1")
        widths = (_STEM_WIDTH, 16 * width, 32 * width, 64 * width)
        self.conv1 = SameConv2d(in_channels, _STEM_WIDTH, 3)
        blocks: list[nn.Module] = []
        for (narrow, wide), stride in zip(pairwise(widths), _STRIDES, strict=True):
            blocks.append(MadryBlock(narrow, wide, stride, activate_before_residual=not blocks))
            blocks += [MadryBlock(wide, wide, 1) for _ in range(blocks_per_group - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(widths[-1], eps=1e-3)
        self.fc = nn.Linear(widths[-1], num_classes)
        initialize_convolutions(self)
        initialize_linear_uniform(self.fc)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W), H and W multiples of 4, to embeddings (N, 64 * width), of either sign."""
        features: Tensor = self.bn(self.blocks(self.conv1(normalized)))
        return F.leaky_relu(features, 0.1).mean(dim=(2, 3))


class WideBlock(PreActivationBlock):
    """Two 3x3 convolutions with ReLUs; on a change of width a 1x1 convolution of the activated input is added."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(conv3x3(in_channels, out_channels, stride), conv3x3(out_channels, out_channels))
        # Named as in the published checkpoints.
        self.convShortcut = None if in_channels == out_channels else conv1x1(in_channels, out_channels, stride)

    def shortcut_of(self, block_input: Tensor, activated: Tensor) -> Tensor:
        """The input, or the projection of its activation."""
        return block_input if self.convShortcut is None else self.convShortcut(activated)


def _group(num_blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Blocks of one width; the first has the stride. Checkpoints name them ``layer.0``, ``layer.1``, ..."""
    first = WideBlock(in_channels, out_channels, stride)
    rest = (WideBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))


class WideResNet(ImageClassifier):
    """Wide ResNet without dropout (Zagoruyko and Komodakis 2016), the embedding being non-negative.

    Module names are those of the TRADES and RobustBench checkpoints (``conv1``, ``block1.layer.0.bn1``, ``bn1``,
    ``fc``). Some of those carry a ``sub_block1`` that their forward never uses; it is left out, since DDP fails on
    parameters without a gradient.

    Args:
        depth: 6 * blocks + 4, for example 28 or 34.
        width: Factor on the groups' 16, 32 and 64 channels.
        num_classes: K.
        in_channels: C.
        normalization: TRADES has none.

    Raises:
        ValueError: The depth is not 6n + 4, or less than 10.
    """

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int, normalization: nn.Module) -> None:
        super().__init__(normalization)
        num_blocks, rest = divmod(depth - 4, 6)
        if rest or num_blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 4 with n >= 1")
        self.conv1 = conv3x3(in_channels, _STEM_WIDTH)
        self.block1 = _group(num_blocks, _STEM_WIDTH, 16 * width, _STRIDES[0])
        self.block2 = _group(num_blocks, 16 * width, 32 * width, _STRIDES[1])
        self.block3 = _group(num_blocks, 32 * width, 64 * width, _STRIDES[2])
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        initialize_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 64 * width), non-negative."""
        features: Tensor = self.block3(self.block2(self.block1(self.conv1(normalized))))
        features = self.bn1(features)
        return features.relu().mean(dim=(2, 3))
