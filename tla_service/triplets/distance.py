"""The distance of the learned metric."""

from torch import Tensor

from tla_service.runtime import wide

# Keeps the direction of an all-zero embedding defined (as zero), and its gradient finite.
SMALLEST_SQUARE = 1e-20


def unit_length(embeddings: Tensor) -> Tensor:
    """Scale each embedding (N, D) to length one; in float32 or wider."""
    embeddings = wide(embeddings)
    return embeddings * (embeddings.square().sum(1, keepdim=True) + SMALLEST_SQUARE).rsqrt()


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of all pairs: (N, D) and (M, D) to (N, M), in [-1, 1] up to rounding."""
    return unit_length(first) @ unit_length(second).T


def angular_distance(first: Tensor, second: Tensor) -> Tensor:
    """D(u, v) = 1 - |cos(u, v)|, row by row (Mao et al. 2019, section 4; no arccos).

    Args:
        first: Embeddings (N, D).
        second: Embeddings (N, D).

    Returns:
        Distances (N,) in [0, 1] up to rounding.
    """
    return 1 - (unit_length(first) * unit_length(second)).sum(1).abs()
