"""Small networks for CPUs. Without BatchNorm, so an image's output and gradient do not depend on its batch."""

from torch import Tensor, nn

from tla_service.models.classifier import ImageClassifier

_EMBEDDING_SIZE = 128


class SmallCNN(ImageClassifier):
    """Convolutions to (N, C', H', W'), C' * H' * W' being `num_features`, then 128 ReLUs: the embedding (>= 0)."""

    def __init__(self, convolutions: nn.Module, num_features: int, num_classes: int, normalization: nn.Module) -> None:
        super().__init__(normalization)
        self.convolutions = convolutions
        self.hidden = nn.Linear(num_features, _EMBEDDING_SIZE)
        self.fc = nn.Linear(_EMBEDDING_SIZE, num_classes)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 128), non-negative."""
        features: Tensor = self.convolutions(normalized)
        return self.hidden(features.flatten(1)).relu()


def build_digits_cnn(num_classes: int, image_shape: tuple[int, int, int], normalization: nn.Module) -> SmallCNN:
    """Two 3x3 convolutions (32, and 64 with stride 2), for scikit-learn's 8x8 digits."""
    channels, height, width = image_shape
    convolutions = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
    )
    # A stride of 2 rounds up: ceil(size / 2).
    return SmallCNN(convolutions, 64 * -(-height // 2) * -(-width // 2), num_classes, normalization)


def build_small_cnn(num_classes: int, image_shape: tuple[int, int, int], normalization: nn.Module) -> SmallCNN:
    """Two 4x4 convolutions (16, 32) of stride 2, for 28x28 or 32x32 images; H and W are at least 4.

    The convolutions are those of Wong and Kolter 2018 (arXiv 1711.00851) for MNIST.
    """
    channels, height, width = image_shape
    convolutions = nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
    )
    return SmallCNN(convolutions, 32 * (height // 4) * (width // 4), num_classes, normalization)
