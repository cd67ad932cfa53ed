"""What every network returns."""

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """Logits and the embeddings they were computed from.

    Attributes:
        logits: (N, K) class scores before the softmax.
        embeddings: (N, D) penultimate activations, which feed the final linear layer: the paper's ``h`` (Mao et al.
            2019, section 4).
    """

    logits: Tensor
    embeddings: Tensor
