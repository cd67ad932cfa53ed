"""The terms of the objective (Mao et al. 2019, equation 1). Every function returns one value per example."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tla_service.runtime import wide
from tla_service.triplets.distance import angular_distance


def triplet_hinge(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """[D(a, p) - D(a, n) + margin]+, row by row: (N, D) three times to (N,), in [0, 1 + margin]."""
    return F.relu(angular_distance(anchors, positives) - angular_distance(anchors, negatives) + margin)


def norm_penalty(embeddings: tuple[Tensor, ...], form: str) -> Tensor:
    """Penalty on the length of embeddings.

    Args:
        embeddings: Anchors, positives and negatives, each (N, D).
        form: `l2_norms` is the sum of their L2 norms (the paper); `mean_squares` the sum of squared entries, averaged
            over the D dimensions (the authors' code).

    Returns:
        One value per example (N,), at least 0.
    """
    if form == "mean_squares":
        return torch.stack([wide(e).square().mean(1) for e in embeddings]).sum(0)
    # A tiny square under the root: the gradient of a zero embedding's norm is then zero instead of NaN.
    return torch.stack([(wide(e).square().sum(1) + 1e-20).sqrt() for e in embeddings]).sum(0)
