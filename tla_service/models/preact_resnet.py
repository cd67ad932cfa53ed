"""Pre-activation ResNet-18 for 32x32 images (He et al. 2016), as in Rice et al. 2020 (arXiv 2002.11569)."""

from torch import Tensor, nn

from tla_service.models.classifier import ImageClassifier
from tla_service.models.residual import PreActivationBlock, conv1x1, conv3x3


class PreActBlock(PreActivationBlock):
    """Two 3x3 convolutions; on a change of shape a 1x1 convolution of the activated input is added."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(conv3x3(in_channels, out_channels, stride), conv3x3(out_channels, out_channels))
        # A Sequential of one, so that its name is ``shortcut.0`` as in the published checkpoints.
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride)) if changes_shape else None

    def shortcut_of(self, block_input: Tensor, activated: Tensor) -> Tensor:
        """The input, or the projection of its activation."""
        return block_input if self.shortcut is None else self.shortcut(activated)


class PreActResNet18(ImageClassifier):
    """Four groups of two blocks (64, 128, 256, 512), BatchNorm and ReLU before the pool; embedding 512, non-negative.

    Module names are those of the widely used CIFAR implementations (``conv1``, ``layer1.0.bn1``, ``bn``, ``linear``).
    Rice et al. normalize by CIFAR-10's mean and standard deviation.
    """

    def __init__(self, *, num_classes: int, in_channels: int, normalization: nn.Module) -> None:
        super().__init__(normalization)
        self.conv1 = conv3x3(in_channels, 64)
        self.layer1 = nn.Sequential(PreActBlock(64, 64, 1), PreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(PreActBlock(64, 128, 2), PreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(PreActBlock(128, 256, 2), PreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(PreActBlock(256, 512, 2), PreActBlock(512, 512, 1))
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    @property
    def classifier(self) -> nn.Linear:
        """The final linear layer, (N, 512) to (N, K)."""
        return self.linear

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 512), non-negative."""
        features: Tensor = self.layer2(self.layer1(self.conv1(normalized)))
        features = self.bn(self.layer4(self.layer3(features)))
        return features.relu().mean(dim=(2, 3))
