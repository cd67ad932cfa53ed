"""Smallest sparse perturbations of each image, their median, and accuracy against the size allowed."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tla_service.attacks.minimum_norm import SparseNorm, minimum_norms
from tla_service.evaluation.intervals import share_of
from tla_service.evaluation.outcomes import Arrays
from tla_service.evaluation.results import Curve, MinimumNorms
from tla_service.evaluation.shards import Shard, evaluating, float32, logits_of

_MOST_POINTS = 40  # of a curve


@dataclass(frozen=True)
class NormMeasurement:
    """The smallest perturbation found for each image; merged to norms (N,): 0 if misclassified, else infinite."""

    norm: SparseNorm
    batch_size: int

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        # The library's backward pass reaches every parameter that wants a gradient: a copy wants none.
        still = copy.deepcopy(shard.network).requires_grad_(requires_grad=False)
        with evaluating(still), float32(shard.device):
            found = [
                minimum_norms(logits_of(still), batch.images, batch.labels, self.norm)
                for batch in shard.batches(self.batch_size)
            ]
        return {"norms": torch.cat(found).cpu().numpy()}

    def merge(self, parts: Sequence[Arrays]) -> npt.NDArray[np.float64]:
        """See `Measurement`."""
        return np.concatenate([part["norms"] for part in parts]).astype(np.float64)


def minimum_norms_of(norms: npt.NDArray[np.float64], norm: SparseNorm) -> MinimumNorms:
    """Summarise the smallest perturbation found for each image (N,): 0 if misclassified, infinite if none."""
    finite = norms[np.isfinite(norms) & (norms > 0)]
    sizes = np.unique(finite) if len(finite) else np.array([1.0])
    if len(sizes) > _MOST_POINTS:
        sizes = np.unique(np.quantile(finite, np.linspace(0, 1, _MOST_POINTS), method="higher"))
    x = (0.0, *(float(size) for size in sizes))
    curve = Curve("FMN", norm, x, tuple(share_of(norms > size) for size in x))
    median = float(np.quantile(norms, 0.5, method="higher")) if len(norms) else math.inf
    return MinimumNorms(norm, len(norms), int((norms == 0).sum()), median if math.isfinite(median) else None, curve)
