"""Attack unit tests: does an attack find an adversarial example that is known to be there?

Source: Zimmermann, Brendel, Tramer and Carlini 2022, "Increasing confidence in adversarial robustness evaluations"
(NeurIPS), the binarization test. The final linear layer is replaced, image by image, by a binary readout that tells
points inside the ball from one planted point on its boundary. The planted point is adversarial, random points are not;
an attack that finds nothing there proves nothing where it finds nothing on the model itself.

Differences from the paper's code: the readout is linear discriminant analysis in closed form instead of logistic
regression, and all readouts are attacked in one batch. Bar and counts below are this project's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, Attack, LogitsFn, attack_images, starting_point
from tla_service.attacks.autoattack import run_autoattack
from tla_service.config.radii import Norm
from tla_service.evaluation.results import AttackTest, Check, UnitTests, share_of
from tla_service.evaluation.shards import Arrays, Shard, as_pixels, evaluating, float32
from tla_service.models import ImageClassifier
from tla_service.models.wrapped import WrappedClassifier
from tla_service.runtime import generator

CHECK = "attacks_find_planted_examples"
FIRST_STAGE: Literal["apgd-ce"] = "apgd-ce"
_BAR = 0.8  # least success rate of an attack
_MOST_RANDOM = 0.5  # above this share found by random sampling, the test is too easy to tell anything
_FEWEST = 10  # planted examples that a rate is judged on
_INNER, _OUTER, _CONTROL = 128, 128, 128  # random points per image: fitted to, for the threshold, for the control
_INNER_RADIUS = 0.95
_RIDGE = 1.0  # of the mean variance
_CLOSENESS = 0.1  # of the way from the planted point to the next random one lies the threshold


@dataclass(frozen=True)
class UnitTestMeasurement:
    """Plants an adversarial example for each image and attacks it; shards, merged to UnitTests.

    `attacks` are those of one threat model; `autoattack` adds APGD-CE, the first stage of AutoAttack, under it.
    """

    attacks: Mapping[str, Attack]
    norm: Norm
    epsilon: float
    autoattack: bool
    seed: int
    batch_size: int

    def run(self, shard: Shard) -> Arrays:
        """Arrays of the planted images (n,): whether random sampling and each attack found an example."""
        device = shard.device
        why = _no_readout(shard.network)
        if why:
            return {"tried": np.array(len(shard.labels)), "why": np.array(why)}
        with evaluating(shard.network), float32(device):
            ball = Attack(norm=self.norm, epsilon=self.epsilon)
            images = _disjoint(as_pixels(shard.images, device), ball)
            random = generator(device, self.seed, crc32(b"planted"), int(shard.rows[0]))
            heads = [_plant(shard.network, image, ball, random, self.batch_size) for image in images]
            kept = [place for place, head in enumerate(heads) if head is not None]
            images, chosen = images[kept], [head for head in heads if head is not None]
            found: Arrays = {
                "tried": np.array(len(shard.labels)),
                "random": np.array([head.found_at_random for head in chosen], dtype=bool),
            }
            if not kept:
                return found
            logits_fn = _binary(shard.network, images, chosen, ball)
            labels = torch.zeros(len(kept), dtype=torch.int64, device=device)
            for name, attack in self.attacks.items():
                draws = generator(device, self.seed, crc32(name.encode()), int(shard.rows[0]))
                broken = attack_images(logits_fn, images, labels, attack, draws).broken_at
                found[f"found/{name}"] = (broken != UNBROKEN).cpu().numpy()
            if self.autoattack:
                result = run_autoattack(
                    logits_fn, images, labels, norm=self.norm, epsilon=self.epsilon, seed=self.seed,
                    batch_size=self.batch_size, only=(FIRST_STAGE,),
                )  # fmt: skip
                found[f"found/{FIRST_STAGE}"] = (~result.robust).cpu().numpy()
        return found

    def merge(self, parts: Sequence[Arrays]) -> UnitTests:
        """See `Measurement`."""
        tried = sum(int(part["tried"]) for part in parts)
        why = next((str(part["why"]) for part in parts if "why" in part), "")
        random = np.concatenate([part.get("random", np.empty(0, bool)) for part in parts])
        if not why and len(random) < _FEWEST:
            why = (
                f"an example could be planted for {len(random)} of {tried} images only, {_FEWEST} are needed: the "
                "embedding does not tell points of the ball apart, or the balls of different images overlap"
            )
        if not why and random.mean() > _MOST_RANDOM:
            why = f"random sampling finds {random.mean():.1%} of the planted examples: they are too easy to find"
        names = {name.removeprefix("found/"): name for part in parts for name in part if name.startswith("found/")}
        attacks = []
        for name, key in names.items():
            share = share_of(np.concatenate([part[key] for part in parts if key in part]))
            attack = self.attacks.get(name)
            # A single step is reported, not judged: that it is weak is known, and no figure rests on it alone.
            single = attack is not None and (attack.kind == "fgsm" or attack.num_steps == 1)
            attacks.append(AttackTest(name, share, judged=not single))
        return UnitTests(tried, share_of(random), tuple(attacks), _BAR, why)


def unit_test_check(tests: UnitTests | None) -> Check:
    """The audit's check: the least success rate of the attacks that are judged, against the bar."""
    meaning = "an attack that misses an adversarial example known to be there proves nothing where it finds none"
    judged = [test.found.estimate or 0.0 for test in tests.attacks if test.judged] if tests is not None else []
    if tests is None or tests.why or not judged:
        why = "not asked for (images.unit_tests)" if tests is None else tests.why or "there is no attack to test"
        return Check.of(CHECK, None, _BAR, why, meaning)
    rates = ", ".join(f"{test.attack} {test.found.estimate:.1%}" for test in tests.attacks)
    statement = f"of {tests.random.images} planted examples, found by {rates}; at random {tests.random.estimate:.1%}"
    return Check.of(CHECK, min(judged), tests.bar, statement, meaning, least=True)


@dataclass(frozen=True)
class _Head:
    """A binary readout of embeddings: adversarial where ``scale * (embedding @ weight - threshold)`` is positive."""

    weight: Tensor
    threshold: Tensor
    scale: Tensor
    found_at_random: bool


def _no_readout(network: nn.Module) -> str:
    """Why the embeddings are not what the final linear layer reads; empty if they are."""
    if isinstance(network, ImageClassifier) and network.tap is not None:
        return f"the embedding is the {network.found}, not what the final linear layer reads (model.embedding)"
    if isinstance(network, WrappedClassifier) and not network.head:
        return "the network has no final linear layer, so no readout can take its place"
    return ""


def _disjoint(images: Tensor, ball: Attack) -> Tensor:
    """The images whose balls do not meet those of earlier ones: a point then tells which image it belongs to."""
    apart = _distances(images, images, ball) > 2 * ball.epsilon
    kept: list[int] = []
    for place in range(len(images)):
        if bool(apart[place, kept].all()):
            kept.append(place)
    return images[kept]


def _distances(first: Tensor, second: Tensor, ball: Attack) -> Tensor:
    return torch.cdist(first.flatten(1), second.flatten(1), p=math.inf if ball.norm == "linf" else 2.0)


def _outer(image: Tensor, count: int, ball: Attack, random: torch.Generator) -> Tensor:
    """Points on the ball's boundary: its corners (L-infinity) or points of its sphere (L2), within [0, 1]."""
    noise = torch.randn((count, *image.shape), generator=random, device=image.device)
    if ball.norm == "linf":
        return (image + ball.epsilon * noise.sign()).clamp(0, 1)
    return (image + ball.epsilon * noise / noise.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)


@torch.no_grad()
def _plant(network: nn.Module, image: Tensor, ball: Attack, random: torch.Generator, batch_size: int) -> _Head | None:
    """A readout under which one random point of the boundary is adversarial; None if there is none."""
    inside = Attack(norm=ball.norm, epsilon=_INNER_RADIUS * ball.epsilon)
    points = [
        image[None],
        starting_point(image.expand(_INNER - 1, *image.shape), inside, random),
        _outer(image, _OUTER, ball, random),
        starting_point(image.expand(_CONTROL // 2, *image.shape), ball, random),
        _outer(image, _CONTROL // 2, ball, random),
        _outer(image, 1, ball, random),
    ]
    outputs = [network(part) for part in torch.cat(points).split(batch_size)]
    embeddings = torch.cat([output.embeddings.float() for output in outputs])
    logits = torch.cat([output.logits.float() for output in outputs])
    weight = _discriminant(embeddings[:_INNER], embeddings[-1])
    scores = embeddings @ weight
    highest, planted = scores[: _INNER + _OUTER].max(), scores[-1]
    threshold = planted - _CLOSENESS * (planted - highest)
    spread = (scores - threshold).abs().max()
    # As large as the model's own logits are: a softmax that saturates on them saturates here too.
    scale = (logits.max() - logits.min()) / (2 * spread)
    if not (planted > threshold > highest and scale > 0 and scale.isfinite()):
        return None
    control = scores[_INNER + _OUTER : -1] > threshold
    return _Head(weight, threshold, scale, bool(control.any()))


def _discriminant(inner: Tensor, planted: Tensor) -> Tensor:
    """Fisher's linear discriminant (D,) of points (M, D) and one point (D,), with a ridge, of length one."""
    # In double, and in M instead of D dimensions by the matrix inversion lemma.
    mean = inner.double().mean(0)
    centred, towards = inner.double() - mean, planted.double() - mean
    gram = centred @ centred.T
    ridge = (_RIDGE * gram.trace() / min(inner.shape)).clamp_min(1e-30)
    solved = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), centred @ towards)
    direction = towards - centred.T @ solved
    return (direction / direction.norm().clamp_min(1e-30)).float()


def _binary(network: nn.Module, images: Tensor, heads: Sequence[_Head], ball: Attack) -> LogitsFn:
    """Logits (N, 2) of points in the balls of images, each by the readout of its image; class 1 is adversarial."""
    weights, thresholds, scales = (
        torch.stack([getattr(head, name) for head in heads]) for name in ("weight", "threshold", "scale")
    )

    def logits_fn(points: Tensor) -> Tensor:
        with torch.no_grad():
            # Attacks drop images on the way: the ball that a point lies in says which image it is of.
            own = _distances(points, images, ball).argmin(1)
        margin = scales[own] * ((network(points).embeddings.float() * weights[own]).sum(1) - thresholds[own])
        return torch.stack([-margin, margin], 1)

    return logits_fn
