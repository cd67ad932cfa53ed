"""What the forward pass of a step sees and returns: adversarial images, clean ones, negatives."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tla_service.models import ModelOutput


class Roles(NamedTuple):
    """What the loss compares, row by row."""

    attacked: ModelOutput  # for the adversarial images; for natural training, the clean ones
    clean: ModelOutput | None = None  # where a term uses it
    negatives: Tensor | None = None  # embedding of each anchor's negative (N, D)
    valid: Tensor | None = None  # whether the anchor has a negative (N,), bool
    same_class: Tensor | None = None  # embedding of another image of each anchor's class (N, D), if it is a positive


class RoleForward(nn.Module):
    """One forward pass for every role (adversarial, clean, negatives, ...): what DDP wraps, once per step.

    BatchNorm sees all roles together, or normalizes each by its own statistics, as in the authors' code.
    """

    def __init__(self, network: nn.Module, *, together: bool) -> None:
        super().__init__()
        self.network, self.together = network, together

    def forward(self, *roles: Tensor) -> tuple[ModelOutput, ...]:
        """Images of each role, (N_i, C, H, W), to its logits and embeddings."""
        if not self.together or len(roles) == 1:
            return tuple(cast("ModelOutput", self.network(images)) for images in roles)
        sizes = [len(images) for images in roles]
        output = cast("ModelOutput", self.network(torch.cat(roles)))
        parts = zip(output.logits.split(sizes), output.embeddings.split(sizes), strict=True)
        return tuple(ModelOutput(logits, embeddings) for logits, embeddings in parts)
