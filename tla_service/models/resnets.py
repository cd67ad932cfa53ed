"""Residual networks: Madry et al.'s, the standard wide one, pre-activation ResNet-18, the paper's for Tiny ImageNet."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from tla_service.models.classifier import ImageClassifier
from tla_service.models.residual import (
    Activation,
    PreActivationBlock,
    SameConv2d,
    SameMaxPool2d,
    initialize,
    initialize_convolutions,
)

_STRIDES = (1, 2, 2)
_LEAKY_RELU = partial(F.leaky_relu, negative_slope=0.1)
_TENSORFLOW_EPS = 1e-3  # BatchNorm's default, which the authors' code leaves as it is


class MadryBlock(PreActivationBlock):
    """Two 3x3 convolutions with leaky ReLUs; a wider output gets the input average-pooled and padded with channels.

    Half of the zeros go before and half after, so the numbers of channels are both even or both odd. With
    ``activate_before_residual`` (first block only) the shortcut starts after the first BatchNorm and activation.
    """

    activation: Activation = staticmethod(_LEAKY_RELU)

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, activate_before_residual: bool = False
    ) -> None:
        convolutions = SameConv2d(in_channels, out_channels, 3, stride), SameConv2d(out_channels, out_channels, 3)
        super().__init__(*convolutions, batch_norm_eps=_TENSORFLOW_EPS)
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
    blocks per group; the released code has 5, and this follows the code. The depth is 6 * blocks + 2, 32 in the paper;
    the width is a factor on the groups' 16, 32 and 64 channels, 10 in the paper.
    """

    activation: Activation = staticmethod(_LEAKY_RELU)

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int, normalization: nn.Module) -> None:
        super().__init__(normalization)
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = SameConv2d(in_channels, widths[0], 3)
        blocks: list[nn.Module] = []
        for (narrow, wide), stride in zip(pairwise(widths), _STRIDES, strict=True):
            blocks.append(MadryBlock(narrow, wide, stride, activate_before_residual=not blocks))
            blocks += [MadryBlock(wide, wide, 1) for _ in range((depth - 2) // 6 - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(widths[-1], eps=_TENSORFLOW_EPS)
        self.fc = nn.Linear(widths[-1], num_classes)
        initialize(self, self.fc)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W), H and W multiples of 4, to embeddings (N, 64 * width), of either sign."""
        features: Tensor = self.bn(self.blocks(self.conv1(normalized)))
        return self.activation(features).mean(dim=(2, 3))


def _block(in_channels: int, out_channels: int, stride: int, name: str = "convShortcut") -> PreActivationBlock:
    """Two 3x3 convolutions with ReLUs; on a change of width a 1x1 convolution of the activated input is added."""
    convolutions = conv(in_channels, out_channels, 3, stride), conv(out_channels, out_channels, 3)
    projection = None if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)
    # In the published checkpoints of the pre-activation ResNet, the projection is a Sequential of one.
    shortcut = nn.Sequential(projection) if projection is not None and name == "shortcut" else projection
    return PreActivationBlock(*convolutions, projection=shortcut, projection_name=name)


class WideResNet(ImageClassifier):
    """Wide ResNet without dropout (Zagoruyko and Komodakis 2016), the embedding non-negative with ReLU.

    Module names are those of the TRADES and RobustBench checkpoints (``conv1``, ``block1.layer.0.bn1``, ``bn1``,
    ``fc``). Some of those carry a ``sub_block1`` that their forward never uses; it is left out, since DDP fails on
    parameters without a gradient. The depth is 6 * blocks + 4, for example 28 or 34; the width is a factor on the
    groups' 16, 32 and 64 channels.
    """

    activation: Activation = staticmethod(F.relu)

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int, normalization: nn.Module) -> None:
        super().__init__(normalization)
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = conv(in_channels, widths[0], 3)
        groups: list[nn.Module] = []
        for (narrow, wide), stride in zip(pairwise(widths), _STRIDES, strict=True):
            blocks = [_block(narrow, wide, stride), *(_block(wide, wide, 1) for _ in range((depth - 4) // 6 - 1))]
            groups.append(nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks))))
        self.block1, self.block2, self.block3 = groups
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        initialize_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 64 * width), non-negative with ReLU."""
        features: Tensor = self.bn1(self.block3(self.block2(self.block1(self.conv1(normalized)))))
        return self.activation(features).mean(dim=(2, 3))


class PreActResNet18(ImageClassifier):
    """Pre-activation ResNet-18 for 32x32 images (He et al. 2016), as in Rice et al. 2020 (arXiv 2002.11569).

    Four groups of two blocks (64, 128, 256, 512), BatchNorm and ReLU before the pool; embedding 512.
    Module names are those of the widely used CIFAR implementations (``layer1.0.bn1``, ``bn``, ``linear``).
    """

    activation: Activation = staticmethod(F.relu)

    def __init__(self, *, num_classes: int, in_channels: int, normalization: nn.Module) -> None:
        super().__init__(normalization)
        self.conv1 = conv(in_channels, 64, 3)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(_block(narrow, wide, stride, "shortcut"), _block(wide, wide, 1, "shortcut"))
            for narrow, wide, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        )
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    @property
    def classifier(self) -> nn.Linear:
        """The final linear layer, (N, 512) to (N, K)."""
        return self.linear

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 512), non-negative with ReLU."""
        features: Tensor = self.layer2(self.layer1(self.conv1(normalized)))
        features = self.bn(self.layer4(self.layer3(features)))
        return self.activation(features).mean(dim=(2, 3))


class TinyBlock(PreActivationBlock):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 ones to 4 * width channels; the first of a group projects its input."""

    def __init__(self, in_channels: int, width: int, stride: int, *, bottleneck: bool, is_first: bool) -> None:
        out_channels = 4 * width if bottleneck else width
        convolutions: tuple[nn.Conv2d, ...]
        if bottleneck:
            middle = SameConv2d(width, width, 3)
            convolutions = conv(in_channels, width, 1, stride), middle, conv(width, out_channels, 1)
        else:
            convolutions = SameConv2d(in_channels, width, 3, stride), SameConv2d(width, width, 3)
        projection = conv(in_channels, out_channels, 1, stride) if is_first else None
        super().__init__(*convolutions, projection=projection, batch_norm_eps=_TENSORFLOW_EPS)
        self.out_channels = out_channels

    def shortcut_of(self, block_input: Tensor, activated: Tensor) -> Tensor:  # noqa: ARG002
        """The input, or its projection."""
        return super().shortcut_of(block_input, block_input)


class TinyImageNetResNet(ImageClassifier):
    """The paper's networks for Tiny ImageNet (Mao et al. 2019, section 5 and Table 7), after the authors' release.

    Stem, four groups of pre-activation blocks, BatchNorm, ReLU, average; the embedding is non-negative. "ResNet-50" is
    the paper's name: the released network has 2, 3, 5 and 2 bottlenecks, 38 weight layers along its depth, where the
    standard ResNet-50 has 3, 4, 6 and 3. "ResNet-20" has one block of two 3x3 convolutions per group. The authors
    standardize each image.

    ``num_blocks`` is of each of the four groups (64, 128, 256, 512 wide); a ``stem_stride`` of 2, for the paper's main
    results, also adds a 3x3 max-pool of stride 2; 1 is for Table 7.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        stem_stride: int,
        *,
        bottleneck: bool,
        num_classes: int,
        in_channels: int,
        normalization: nn.Module,
    ) -> None:
        super().__init__(normalization)
        channels = 64
        stem = SameConv2d(in_channels, channels, 7, stem_stride)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(channels, eps=_TENSORFLOW_EPS), nn.ReLU())
        if stem_stride > 1:
            self.stem.append(SameMaxPool2d(3, 2))
        blocks: list[TinyBlock] = []
        for width, count in zip((64, 128, 256, 512), num_blocks, strict=True):
            for index in range(count):
                stride = 2 if blocks and index == 0 else 1
                blocks.append(TinyBlock(channels, width, stride, bottleneck=bottleneck, is_first=index == 0))
                channels = blocks[-1].out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels, eps=_TENSORFLOW_EPS)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self, self.fc)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 2048 or 512), non-negative."""
        return self.bn(self.blocks(self.stem(normalized))).relu().mean(dim=(2, 3))


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A square convolution of odd size without bias, padded by the same number of zeros on every side."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
