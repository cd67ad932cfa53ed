"""The paper's MNIST networks: a modified LeNet (Mao et al. 2019, Table 5) and the authors' multilayer perceptron."""

from collections.abc import Mapping

from torch import Tensor, nn

from tla_service.models.classifier import ImageClassifier

_WIDTH = 1024
# What the authors' code returns: the second and the fourth BatchNorm, before the ReLU. That these are Table 10's lower
# and middle layers is our reading.
_CNN_LAYERS: Mapping[str, int] = {"lower": 4, "middle": 11}
_BATCH_NORM_EPS = 1e-3  # TensorFlow's default, which the authors' code leaves as it is; torch's is 1e-5


class MnistNetwork(ImageClassifier):
    """Hidden layers of BatchNorm and ReLU; the last, of 1024, is the embedding (>= 0).

    Convolution and linear weights start at N(0, 0.1^2) truncated at two sigma, biases at 0.1 (the authors' release).

    The body maps normalized images to embeddings; `layers` are named positions in it.
    """

    def __init__(
        self,
        body: nn.Sequential,
        num_classes: int,
        normalization: nn.Module,
        layers: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(normalization)
        self.layers = layers or {}
        self.body = body
        self.fc = nn.Linear(_WIDTH, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
                nn.init.constant_(module.get_parameter("bias"), 0.1)

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps (N, C, H, W) to embeddings (N, 1024), non-negative."""
        return self.body(normalized)

    def embed_with(self, normalized: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """Embeddings (N, 1024), and a layer's activations (N, C', H', W')."""
        hidden, activations = normalized, normalized
        for position, module in enumerate(self.body):
            hidden = module(hidden)
            if position == self.layers[layer]:
                activations = hidden
        return hidden, activations


def build_mnist_cnn(num_classes: int, image_shape: tuple[int, int, int], normalization: nn.Module) -> MnistNetwork:
    """3x3 convolutions 32, 64, pool, 128, 256, pool, then 1024: Mao et al. 2019, Table 5. H and W are at least 4."""
    channels, height, width = image_shape
    body = nn.Sequential(
        *_convolution(channels, 32),
        *_convolution(32, 64),
        nn.MaxPool2d(2),
        *_convolution(64, 128),
        *_convolution(128, 256),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *_hidden(256 * (height // 4) * (width // 4)),
    )
    return MnistNetwork(body, num_classes, normalization, _CNN_LAYERS)


def build_mnist_mlp(num_classes: int, image_shape: tuple[int, int, int], normalization: nn.Module) -> MnistNetwork:
    """Three hidden layers of 1024: what the authors' MNIST configuration selects; the paper's results are the CNN's."""
    channels, height, width = image_shape
    body = nn.Sequential(nn.Flatten(), *_hidden(channels * height * width), *_hidden(_WIDTH), *_hidden(_WIDTH))
    return MnistNetwork(body, num_classes, normalization)


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels, eps=_BATCH_NORM_EPS),
        nn.ReLU(),
    )


def _hidden(in_features: int) -> tuple[nn.Module, ...]:
    return nn.Linear(in_features, _WIDTH), nn.BatchNorm1d(_WIDTH, eps=_BATCH_NORM_EPS), nn.ReLU()
