"""A white-box attack on classifier and detector together, in the ball of the threat model.

A detector that was only attacked by adversaries who do not know it is untested (Carlini and Wagner 2017, "Adversarial
examples are not easily detected: bypassing ten detection methods"; Tramer et al. 2020, "On adaptive attacks to
adversarial example defenses"). Evasion makes the prediction wrong and the detector's score high; rejection makes the
score low, so that the detector turns a clean image away. Neither needs the threshold: each image keeps its best point,
and whether that is accepted follows for every threshold.

Evasion is selective PGD (Bryniarski et al. 2022, "Evading adversarial example detection defenses with orthogonal
projected gradient descent", section 4.1): a step follows the margin until the image is misclassified, then the score.
It aims at any wrong class, then at the likeliest ones. Images that were broken are refined from their best point along
the weighted sum of both gradients, each scaled to length one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from tla_service.attacks import Attack
from tla_service.attacks.gradient import direction, projection, starting_point
from tla_service.data import Batch
from tla_service.evaluation.embedding import EmbeddedImages, EmbeddingMeasurement, embed
from tla_service.evaluation.shards import Arrays, Shard, evaluating, float32
from tla_service.inference.detector import NO_GAUSSIAN, SMALLEST_SQUARE, Detector
from tla_service.runtime import generator

Aim = Literal["evasion", "rejection"]
AIMS: tuple[Aim, ...] = ("evasion", "rejection")
# Steps of a round; their length falls from a share of the radius to almost nothing, along a cosine.
_STEPS, _FIRST_STEP, _REFINING_STEP, _LAST_STEP = 30, 0.25, 0.1, 0.001
# A wrong class must lead by this share of the largest logit: rounding elsewhere does not undo it.
_LEAD = 1e-5


class _Round(NamedTuple):
    """One run over the images: towards the n-th likeliest wrong class (0: any), or on from the best points so far."""

    target: int = 0
    broken_only: bool = False
    weight: float = 0.0  # of the second gradient; 0: from a random start, one gradient at a time


_EVASION = (_Round(0), _Round(1), _Round(2, True), _Round(0, True, 0.3), _Round(0, True, 1.0))
_REJECTION = (_Round(), _Round())


class DetectionScore:
    """`Detector.score` as a differentiable function, in float32."""

    def __init__(self, detector: Detector, device: torch.device) -> None:
        self._normalize, self._rule = detector.normalize, detector.rule
        # Copied: arrays from Ray's object store are read-only, which torch warns of.
        self._classes = torch.tensor(detector.classes, device=device)
        tables = (detector.means, detector.whitening, detector.log_determinants)
        self._means, self._whitening, log_determinants = (
            torch.tensor(table, dtype=torch.float32, device=device) for table in tables
        )
        self._constants = log_determinants - 0.5 * detector.means.shape[1] * math.log(2 * math.pi)

    def densities(self, embeddings: Tensor) -> Tensor:
        """Log densities (N, G) in nats of embeddings (N, D)."""
        rows, factor = embeddings.float(), self._whitening
        if self._normalize:
            rows = rows / (rows.square().sum(1, keepdim=True) + SMALLEST_SQUARE).sqrt()
        if factor.ndim == 3 and len(factor) == 1:  # tied: each row is whitened once
            white = (rows @ factor[0])[:, None] - self._means @ factor[0]
        else:
            away = rows[:, None] - self._means
            white = away * factor if factor.ndim == 2 else torch.einsum("ngd,gde->nge", away, factor)
        return self._constants - 0.5 * white.square().sum(2)

    def of_class(self, densities: Tensor, classes: Tensor) -> Tensor:
        """Log density (N,) under the given classes (N,); constant where one has no Gaussian."""
        places = torch.searchsorted(self._classes, classes).clamp_max(len(self._classes) - 1)
        found = densities.gather(1, places[:, None]).squeeze(1)
        return torch.where(self._classes[places] == classes, found, NO_GAUSSIAN)

    def __call__(self, densities: Tensor, predictions: Tensor) -> Tensor:
        """The detector's score (N,), by its rule."""
        return densities.amax(1) if self._rule == "likeliest" else self.of_class(densities, predictions)


def attack_detector(
    network: nn.Module,
    detector: Detector,
    batch: Batch,
    attack: Attack,
    aim: Aim,
    random: torch.Generator | None = None,
) -> Tensor:
    """Attack classifier and detector together; norm and radius are the attack's.

    Args:
        network: Bare network in eval mode.
        detector: What its embeddings are judged by.
        batch: Clean images (N, C, H, W) in [0, 1] and true classes (N,).
        attack: The adversary; number and length of steps are not read.
        aim: `evasion` looks for the misclassified image of the highest score, `rejection` for the image of the lowest.
        random: Source of the random starts, on the images' device.

    Returns:
        Adversarial images (N, C, H, W) in [0, 1], within `attack.epsilon` of the clean ones; the clean image where no
        misclassified one was found.
    """
    score, images, labels = DetectionScore(detector, batch.images.device), batch.images, batch.labels
    best, highest = images.clone(), torch.full(labels.shape, -torch.inf, device=images.device)
    with torch.no_grad():
        logits = network(images).logits
    others = logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    for each in _EVASION if aim == "evasion" else _REJECTION:
        chosen = (highest > -torch.inf) | (not each.broken_only)
        rows = chosen.nonzero().squeeze(1)
        if each.target >= logits.shape[1] or not len(rows):
            continue
        clean, truth = images[rows], labels[rows]
        target = others[rows, each.target - 1] if each.target else None
        start = best[rows] if each.weight else starting_point(clean, attack, random)
        project, first = projection(clean, attack), _REFINING_STEP if each.weight else _FIRST_STEP
        for step in range(_STEPS + 1):
            start = start.detach().requires_grad_()
            with torch.enable_grad():
                output = network(start)
                densities = score.densities(output.embeddings)
                found = score(densities, output.logits.argmax(1))
                margin = _lead(output.logits, truth, target)
                value, valid = found.detach(), _lead(output.logits, truth, None).detach()
                valid = valid > _LEAD * output.logits.detach().abs().amax(1)
                if aim == "rejection":
                    value, valid = -value, torch.ones_like(valid)
                better = valid & (value > highest[rows])
                best[rows[better]], highest[rows[better]] = start.detach()[better], value[better]
                if step == _STEPS:
                    break
                if aim == "rejection":
                    (gradient,) = torch.autograd.grad(-found.sum(), start)
                else:
                    raised = found if target is None else score.of_class(densities, target)
                    gradient = _selected(start, margin, raised, each.weight)
            size = attack.epsilon * max(_LAST_STEP, first * (1 + math.cos(math.pi * step / _STEPS)) / 2)
            start = project(start.detach() + size * direction(gradient, attack))
    return best


def _lead(logits: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
    """By how much the best wrong class leads over the true one, or the target over all others (N,)."""
    if target is None:
        wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        return wrong - logits.gather(1, labels[:, None]).squeeze(1)
    best_other = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    return logits.gather(1, target[:, None]).squeeze(1) - best_other


def _selected(images: Tensor, margin: Tensor, score: Tensor, weight: float) -> Tensor:
    """Gradient of the margin where it is negative, else of the score; plus the other one's, times the weight."""
    if not weight:
        (gradient,) = torch.autograd.grad(torch.where(margin > 0, score, margin).sum(), images)
        return gradient
    (of_margin,) = torch.autograd.grad(margin.sum(), images, retain_graph=True)
    (of_score,) = torch.autograd.grad(score.sum(), images)
    of_margin, of_score = (direction(gradient, Attack(norm="l2")) for gradient in (of_margin, of_score))
    is_wrong = (margin > 0)[:, None, None, None]
    return torch.where(is_wrong, of_score + weight * of_margin, of_margin + weight * of_score)


@dataclass(frozen=True)
class AdaptiveMeasurement:
    """Embeddings and logits of images after an attack on a detector; merged to EmbeddedImages."""

    detector: Detector
    aim: Aim
    attack: Attack
    seed: int
    batch_size: int

    def run(self, shard: Shard) -> Arrays:
        """See `Measurement`."""
        random = generator(shard.device, self.seed, crc32(self.aim.encode()), int(shard.rows[0]))
        network, attacked = shard.network, []
        with evaluating(network), float32(shard.device):
            for batch in shard.batches(self.batch_size):
                images = attack_detector(network, self.detector, batch, self.attack, self.aim, random)
                attacked.append(Batch(images, batch.labels))
        nothing = shard.images[:0].float().cpu().numpy()
        return {**vars(embed(network, attacked)), "rows": shard.rows, "pixels": nothing}

    def merge(self, parts: Sequence[Arrays]) -> EmbeddedImages:
        """See `Measurement`."""
        return EmbeddingMeasurement(None, self.seed, self.batch_size).merge(parts)
