"""A small residual network with BatchNorm and dropout."""

from layers import ResidualBlock
from torch import Tensor, nn


class Network(nn.Module):
    """Logits (N, K) of images (N, C, H, W) in [0, 1]."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(ResidualBlock(width, width), ResidualBlock(width, 2 * width, stride=2))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Convolutions, the mean over space, a linear layer."""
        features = self.blocks(self.stem(images)).mean(dim=(2, 3))
        return self.head(self.dropout(features))


def build(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """What ``model.name`` names: ``network:build``."""
    return Network(num_classes, image_shape)
