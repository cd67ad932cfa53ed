"""The paper's networks for Tiny ImageNet (Mao et al. 2019, section 5 and Table 7), after the authors' release.

"ResNet-50" is the paper's name: the released network has 2, 3, 5 and 2 bottlenecks, 38 weight layers along its depth,
where the standard ResNet-50 has 3, 4, 6 and 3. "ResNet-20" has one block of two 3x3 convolutions per group.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tla_service.models.classifier import ImageClassifier
from tla_service.models.residual import (
    PreActivationBlock,
    conv1x1,
    initialize_convolutions,
    initialize_linear_uniform,
)
from tla_service.models.same_padding import SameConv2d, SameMaxPool2d

_BATCH_NORM_EPS = 1e-3  # TensorFlow's default, which the authors' code leaves as it is
_STEM_WIDTH = 64
_GROUP_WIDTHS = (64, 128, 256, 512)
_GROUP_STRIDES = (1, 2, 2, 2)
_BOTTLENECK_EXPANSION = 4


class TinyBlock(PreActivationBlock):
    """Two or three convolutions; the first block of a group adds a 1x1 convolution of its input before activation."""

    def __init__(self, convolutions: Sequence[nn.Conv2d], projection: nn.Conv2d | None) -> None:
        super().__init__(*convolutions, batch_norm_eps=_BATCH_NORM_EPS)
        self.projection = projection
        self.out_channels = convolutions[-1].out_channels

    def shortcut_of(self, block_input: Tensor, activated: Tensor) -> Tensor:  # noqa: ARG002
        """The input, or its projection."""
        return block_input if self.projection is None else self.projection(block_input)


def bottleneck_block(in_channels: int, width: int, stride: int, *, is_first: bool) -> TinyBlock:
    """1x1, 3x3 and 1x1 convolutions; 4 * width output channels."""
    out_channels = _BOTTLENECK_EXPANSION * width
    convolutions = (conv1x1(in_channels, width, stride), SameConv2d(width, width, 3), conv1x1(width, out_channels))
    return TinyBlock(convolutions, conv1x1(in_channels, out_channels, stride) if is_first else None)


def basic_block(in_channels: int, width: int, stride: int, *, is_first: bool) -> TinyBlock:
    """Two 3x3 convolutions; ``width`` output channels."""
    convolutions = (SameConv2d(in_channels, width, 3, stride), SameConv2d(width, width, 3))
    return TinyBlock(convolutions, conv1x1(in_channels, width, stride) if is_first else None)


class TinyImageNetResNet(ImageClassifier):
    """Stem, four groups of pre-activation blocks, BatchNorm, ReLU, average; the embedding is non-negative.

    Args:
        block: Makes a block from (in_channels, width, stride, is_first=...).
        num_blocks: Blocks in each of the four groups (64, 128, 256, 512 wide).
        stem_stride: 2 for the paper's main results, which also adds a 3x3 max-pool of stride 2; 1 for Table 7.
        num_classes: K; 200 in the paper.
        in_channels: C.
        normalization: Applied to the images first; the authors standardize each image.
    """

    def __init__(
        self,
        block: Callable[..., TinyBlock],
        num_blocks: Sequence[int],
        stem_stride: int,
        *,
        num_classes: int,
        in_channels: int,
        normalization: nn.Module,
    ) -> None:
        super().__init__(normalization)
        self.stem = nn.Sequential(
            SameConv2d(in_channels, _STEM_WIDTH, 7, stem_stride),
            nn.BatchNorm2d(_STEM_WIDTH, eps=_BATCH_NORM_EPS),
            nn.ReLU(),
        )
        if stem_stride > 1:
            self.stem.append(SameMaxPool2d(3, 2))
        channels = _STEM_WIDTH
        blocks: list[TinyBlock] = []
        for width, stride, count in zip(_GROUP_WIDTHS, _GROUP_STRIDES, num_blocks, strict=True):
            for index in range(count):
                blocks.append(block(channels, width, stride if index == 0 else 1, is_first=index == 0))
                channels = blocks[-1].out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS)
        self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)
        initialize_linear_uniform(self.fc)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 2048 or 512), non-negative."""
        return self.bn(self.blocks(self.stem(normalized))).relu().mean(dim=(2, 3))
