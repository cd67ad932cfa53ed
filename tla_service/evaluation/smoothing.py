"""Randomised smoothing (Cohen, Rosenfeld and Kolter 2019): certificates of the network's vote under Gaussian noise.

The smoothed classifier predicts the class that the network gives most often to ``x + N(0, sigma^2 I)``. If that class
has probability p > 1/2, no perturbation shorter in L2 than ``sigma * Phi^-1(p)`` changes the prediction (theorem 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from tla_service.attacks import Attack, LogitsFn, is_right
from tla_service.attacks.gradient import direction
from tla_service.evaluation.certified import ABSTAINED, ROW, Certificates
from tla_service.evaluation.shards import Arrays, Shard, evaluating, float32, logits_of
from tla_service.runtime import generator

SELECTION = 100  # draws that choose the class (n0 of the paper), and that vote on attacked images
_STEPS = {"network": 20, "smoothed": 5}
_ATTACK_DRAWS = 8
_L2 = Attack(norm="l2")


@dataclass(frozen=True)
class CertificationMeasurement:
    """Certificates of images, each attacked within its own; merged to rows of `ROW`.

    Noise depends on the seed and the image alone.
    """

    sigma: float
    samples: int
    alpha: float
    seed: int
    batch_size: int

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        rows = np.zeros(len(shard.labels), ROW)
        rows["index"], rows["label"] = shard.rows, shard.labels.cpu().numpy()
        with evaluating(shard.network), float32(shard.device):
            logits_fn = logits_of(shard.network)
            draws = [generator(shard.device, self.seed, crc32(b"certified"), int(row)) for row in shard.rows]
            size = max(1, self.batch_size // _ATTACK_DRAWS)
            for start, batch in zip(range(0, len(rows), size), shard.batches(size), strict=True):
                part = slice(start, start + size)
                self._measure(logits_fn, batch.images, batch.labels, draws[part], rows[part])
        return {"certified": rows}

    def _measure(
        self, logits_fn: LogitsFn, images: Tensor, labels: Tensor, draws: Sequence[torch.Generator], rows: Certificates
    ) -> None:
        """Fill in the rows of a batch."""
        for image, random, row in zip(images, draws, rows, strict=True):
            row["predicted"], row["l2"] = certify(
                logits_fn, image, self.sigma, self.samples, self.alpha, random, self.batch_size
            )
        rows["linf"] = rows["l2"] / math.sqrt(images[0].numel())
        radii = torch.as_tensor(rows["l2"].astype(np.float32), device=images.device)
        silent = torch.zeros_like(images).unsqueeze(1)
        attacked = attack_within(logits_fn, images, labels, radii, silent, _STEPS["network"])
        with torch.no_grad():
            rows["clean"] = is_right(logits_fn(images), labels).cpu().numpy()
            rows["network_stands"] = rows["clean"] & is_right(logits_fn(attacked), labels).cpu().numpy()
        predicted = torch.as_tensor(rows["predicted"].copy(), device=images.device)
        noise = torch.stack(
            [_noise(image, self.sigma, _ATTACK_DRAWS, random) for image, random in zip(images, draws, strict=True)]
        )
        attacked = attack_within(logits_fn, images, predicted.clamp(min=0), radii, noise, _STEPS["smoothed"])
        for image, random, row in zip(attacked, draws, rows, strict=True):
            votes = _votes(logits_fn, image, self.sigma, SELECTION, random, self.batch_size)
            row["smoothed_stands"] = row["predicted"] == ABSTAINED or not _outvoted(votes, row["predicted"], self.alpha)

    def merge(self, parts: Sequence[Arrays]) -> Certificates:
        """See `Measurement`."""
        return np.concatenate([part["certified"] for part in parts])


def certify(
    logits_fn: LogitsFn,
    image: Tensor,
    sigma: float,
    samples: int,
    alpha: float,
    random: torch.Generator,
    batch_size: int,
) -> tuple[int, float]:
    """The smoothed prediction on an image (C, H, W) in [0, 1], and the L2 radius within which it is certified.

    `ABSTAINED` and 0 if no class has a majority beyond doubt. Wrong with a probability of `alpha` at most: `SELECTION`
    draws choose the class, `samples` others bound its probability (Clopper and Pearson, one-sided). Source: Cohen et
    al. 2019, CERTIFY in section 3.2.2.
    """
    from scipy.stats import beta, norm

    chosen = int(_votes(logits_fn, image, sigma, SELECTION, random, batch_size).argmax())
    count = int(_votes(logits_fn, image, sigma, samples, random, batch_size)[chosen])
    lowest = float(beta.ppf(alpha, count, samples - count + 1)) if count else 0.0
    return (chosen, float(sigma * norm.ppf(lowest))) if lowest > 0.5 else (ABSTAINED, 0.0)


def attack_within(
    logits_fn: LogitsFn, images: Tensor, classes: Tensor, radii: Tensor, noise: Tensor, steps: int
) -> Tensor:
    """PGD in L2 against the mean prediction under noise, on images (N, C, H, W), each within a radius (N,) of its own.

    `noise` is (N, M, C, H, W); zeros with M = 1 attack the network itself. Ascends the cross-entropy of `classes` (N,).
    Returns images in [0, 1]. Source: SmoothAdv-PGD, Salman et al. 2019, equation 6.
    """
    moved, sizes = images, radii.view(-1, 1, 1, 1)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        logits = logits_fn((moved.unsqueeze(1) + noise).flatten(0, 1))
        mean = logits.log_softmax(1).unflatten(0, noise.shape[:2]).logsumexp(1)
        loss = mean.gather(1, classes.view(-1, 1)).sum()
        (gradient,) = torch.autograd.grad(-loss, moved)
        offset = moved.detach() + 2.5 * sizes / steps * direction(gradient, _L2) - images
        lengths = offset.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (images + offset * (sizes / lengths.clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)
    return moved.detach()


def _outvoted(votes: Tensor, predicted: int, alpha: float) -> bool:
    """Whether another class has a majority over the predicted one beyond doubt (PREDICT, Cohen et al. 2019)."""
    from scipy.stats import binomtest

    other, own = int(votes.max()), int(votes[predicted])
    return other > own and binomtest(other, other + own, 0.5).pvalue <= alpha


def _noise(image: Tensor, sigma: float, count: int, random: torch.Generator) -> Tensor:
    shape = (count, *image.shape)
    return sigma * torch.randn(shape, generator=random, device=image.device, dtype=image.dtype)


@torch.no_grad()
def _votes(
    logits_fn: LogitsFn, image: Tensor, sigma: float, count: int, random: torch.Generator, batch_size: int
) -> Tensor:
    """How often each class is predicted under noise (K,); logits with NaN vote for none."""
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    logits = torch.cat([logits_fn(image + _noise(image, sigma, size, random)) for size in sizes])
    return logits[~logits.isnan().any(1)].argmax(1).bincount(minlength=logits.shape[1])
