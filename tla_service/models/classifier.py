"""The one shape that every network has: normalise, embed, classify linearly."""

from torch import Tensor, nn

from tla_service.models.output import ModelOutput


class ImageClassifier(nn.Module):
    """Base of all networks. A subclass defines :meth:`embed` and keeps its final linear layer as ``fc``.

    Args:
        normalization: Applied to the images inside the network, so that attacks differentiate through it and their
            budgets stay in [0, 1] pixels.
    """

    fc: nn.Linear

    def __init__(self, normalization: nn.Module) -> None:
        super().__init__()
        self.normalization = normalization

    @property
    def classifier(self) -> nn.Linear:
        """The final linear layer, (N, D) to (N, K)."""
        return self.fc

    @property
    def embedding_size(self) -> int:
        """D, the width of the embeddings."""
        return self.classifier.in_features

    def embed(self, normalized: Tensor) -> Tensor:
        """Maps normalised images (N, C, H, W) to embeddings (N, D)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> ModelOutput:
        """Classifies.

        Args:
            images: (N, C, H, W), floating point, in [0, 1].

        Returns:
            Logits (N, K) and embeddings (N, D), with ``logits == classifier(embeddings)``.
        """
        embeddings = self.embed(self.normalization(images))
        return ModelOutput(logits=self.classifier(embeddings), embeddings=embeddings)


class LogitsOnly(nn.Module):
    """A network that returns logits alone, as attack toolboxes and RobustBench expect of a model.

    Args:
        classifier: The network; shared, not copied.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.classifier(images).logits
        return logits
