"""Is the robustness real? Checks for gradient masking, each with its figure, threshold and meaning.

Sources: Athalye, Carlini and Wagner 2018, section 3.1; Carlini et al. 2019, "On evaluating adversarial robustness";
Tramer et al. 2020. Thresholds are settings of this project, wide enough for the noise of some hundred images.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tla_service.attacks import Attack, LogitsFn, is_right, starting_point
from tla_service.attacks.autoattack import run_autoattack
from tla_service.attacks.gradient import climb_until_repeated
from tla_service.evaluation.results import Audit, Check
from tla_service.evaluation.shards import Arrays, Shard, as_pixels, evaluating, float32, frozen, logits_of
from tla_service.evaluation.suite import clean_logits
from tla_service.runtime import autocast, generator

# Attacks made on a network that knows much less than the model say nothing about the model.
_LEAST_SURROGATE = 0.5
# By check: the most that its figure may be (the last one: the least), and what a failure means. Figures are shares of
# images; of `loss_has_settled` it is the share of what the attack had added to the loss.
CHECKS = {
    "iterative_against_single_step": (
        0.01,
        "many small steps do worse than one large step: gradients near the images mislead",
    ),
    "white_box_against_transfer": (
        0.01,
        "an attacker who does not know the network does better than one who does: its gradients hide the way",
    ),
    "white_box_against_square": (0.02, "a search without gradients finds what gradients do not: they are masked"),
    "accuracy_at_large_epsilon": (
        0.01,
        "each of them can be turned into an image of another class there, which the attack does not find",
    ),
    "more_steps_not_weaker": (0.01, "the attack loses its way as it goes on: the loss surface is broken up"),
    "more_steps_gain_little": (0.03, "the attack was stopped early; with more steps the reported robustness falls"),
    "loss_has_settled": (0.25, "the loss still rises steeply when the attack ends; use more or longer steps"),
    "gradients_do_not_vanish": (0.01, "gradient attacks stand still on these images and call them robust"),
    "cross_entropy_against_margin": (
        0.05,
        "the softmax saturates and hides the gradient; large logits make the cross-entropy a poor guide",
    ),
    "bfloat16_agrees_with_float32": (
        0.97,
        "predictions hang on rounding: small numerical noise stands in for robustness",
    ),
}


@dataclass(frozen=True)
class AuditMeasurement:
    """Looks for signs that attacks fail for other reasons than robustness; one shard, merged to an Audit.

    Some hundred test images are enough. `attack` is the iterative white-box attack that the report relies on, with one
    start; `no_surrogate` is why the transfer check is not run, if there is no surrogate.
    """

    attack: Attack
    seed: int
    batch_size: int
    no_surrogate: str = "there is no surrogate"
    square_queries: int = 1000

    def run(self, shard: Shard) -> Arrays:
        """Run every check; ConfigError if the network cannot take the images, or gives logits that are not finite."""
        one = replace(self.attack, kind="pgd", num_restarts=1)
        with evaluating(shard.network, shard.surrogate), float32(shard.device):
            pixels, labels = as_pixels(shard.images, shard.device), shard.labels.to(shard.device)
            logits_fn, size = logits_of(shard.network), self.batch_size
            own_fn = logits_of(frozen(shard.network, pixels[:size]))
            subject = _Subject(logits_fn, own_fn, pixels, labels, one, self.seed, size)
            for batch in subject.batches():
                clean_logits(logits_fn, *batch)
            attacked = subject.attacked(one)
            standing = subject.standing(attacked)
            iterative = _mean(standing)
            single_step = f"{{:.1%}} stand after {one.num_steps} steps, {{:.1%}} after one"
            margin = "{:.1%} stand when the cross-entropy is ascended, {:.1%} when the logit margin is"
            results = [
                _other_kind(subject, "iterative_against_single_step", "fgsm", iterative, single_step),
                _transfer(subject, iterative, shard.surrogate or self.no_surrogate),
                _square(subject, standing, self.square_queries),
                _far(subject),
                *_steps(subject, iterative, attacked),
                _gradients(subject),
                _other_kind(subject, "cross_entropy_against_margin", "cw", iterative, margin),
                _bfloat16(subject, attacked),
            ]
        return {"audit": np.array(json.dumps(asdict(Audit.of(results, len(shard.labels)))))}

    def merge(self, parts: Sequence[Arrays]) -> Audit:
        """See `Measurement`."""
        (only,) = parts
        found = json.loads(str(only["audit"]))
        return Audit.of([Check(**check) for check in found["checks"]], found["images"])


@dataclass(frozen=True)
class _Subject:
    """What the checks measure on, and the attack they vary; gradients come from the frozen twin."""

    logits_fn: LogitsFn
    frozen_fn: LogitsFn
    images: Tensor
    labels: Tensor
    attack: Attack
    seed: int
    batch_size: int

    def batches(self, images: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Batches of images (by default the clean ones) and labels."""
        images = self.images if images is None else images
        return list(zip(images.split(self.batch_size), self.labels.split(self.batch_size), strict=True))

    def attacked(self, attack: Attack, start: Tensor | None = None, crafted_on: LogitsFn | None = None) -> Tensor:
        """Images (N, C, H, W) after the attack's steps from other images, by default from one random start."""
        # In the same state each time: attacks that are compared begin at the same points.
        random, batches = generator(self.images.device, self.seed), self.batches()
        if start is None:
            start = torch.cat([starting_point(x, attack, random) for x, _ in batches])
        starts, source = start.split(self.batch_size), crafted_on or self.frozen_fn
        pairs = zip(starts, batches, strict=True)
        return torch.cat([climb_until_repeated(source, x, begin, y, attack) for begin, (x, y) in pairs])

    def standing(self, attacked: Tensor) -> Tensor:
        """Which images are classified correctly, clean and attacked (N,)."""
        with torch.no_grad():
            right = [is_right(self.logits_fn(x), y) for each in (None, attacked) for x, y in self.batches(each)]
        return torch.cat(right).view(2, -1).all(0)

    def loss(self, images: Tensor) -> float:
        """Mean cross-entropy of the images that have one: attacked ones may give NaN, which counts as broken."""
        with torch.no_grad():
            losses = [F.cross_entropy(self.logits_fn(x), y, reduction="none") for x, y in self.batches(images)]
        return float(torch.cat(losses).double().nanmean())


def _check(name: str, figure: float | None, statement: str) -> Check:
    """Hold a figure against its threshold; None: the check was not run, for the reason stated."""
    threshold, meaning = CHECKS[name]
    return Check.of(name, figure, threshold, statement, meaning, least=name == "bfloat16_agrees_with_float32")


def _other_kind(subject: _Subject, name: str, kind: Literal["fgsm", "cw"], iterative: float, statement: str) -> Check:
    """An attack of another kind in place of the iterative one; `statement` takes the shares that stand under both."""
    other = _mean(subject.standing(subject.attacked(replace(subject.attack, kind=kind))))
    return _check(name, iterative - other, statement.format(iterative, other))


def _transfer(subject: _Subject, iterative: float, surrogate: nn.Module | str) -> Check:
    """`surrogate` is a network, or why there is none."""
    name = "white_box_against_transfer"
    if isinstance(surrogate, str):
        return _check(name, None, surrogate)
    crafted_on = logits_of(frozen(surrogate, subject.images[: subject.batch_size]))
    with torch.no_grad():
        right, other = (
            _mean(torch.cat([logits_fn(x).argmax(1) == y for x, y in subject.batches()]))
            for logits_fn in (subject.logits_fn, crafted_on)
        )
    if other < _LEAST_SURROGATE * right:
        why = f"the surrogate classifies only {other:.1%} of the images correctly, the model {right:.1%}"
        return _check(name, None, why)
    transferred = _mean(subject.standing(subject.attacked(subject.attack, crafted_on=crafted_on)))
    statement = (
        f"{iterative:.1%} stand in the white box, {transferred:.1%} after transfer from a surrogate with "
        f"{other:.1%} clean accuracy"
    )
    return _check(name, iterative - transferred, statement)


def _square(subject: _Subject, standing: Tensor, queries: int) -> Check:
    name, fell = "white_box_against_square", 0
    if standing.any():
        result = run_autoattack(
            subject.logits_fn,
            subject.images[standing],
            subject.labels[standing],
            norm=subject.attack.norm,
            epsilon=subject.attack.epsilon,
            seed=subject.seed,
            batch_size=subject.batch_size,
            only=("square",),
            square_queries=queries,
            crafted_on=subject.frozen_fn,
        )
        if "square" in result.left_out:
            return _check(name, None, result.left_out["square"])
        fell = int((~result.robust).sum())
    left = int(standing.sum())
    statement = f"Square's {queries} queries break {fell} of {left} images that the white-box attack leaves"
    return _check(name, fell / len(standing), statement)


def _far(subject: _Subject) -> Check:
    # Within this radius lies mid-grey, whatever the image: only those of the class predicted for it can stand.
    attack, pixels = subject.attack, math.prod(subject.images.shape[1:])
    radius = max(attack.epsilon, 0.5 if attack.norm == "linf" else 0.5 * math.sqrt(pixels))
    steps = max(50, attack.num_steps)
    far = subject.attacked(replace(attack, epsilon=radius, step_size=radius / 10, num_steps=steps))
    with torch.no_grad():
        grey = subject.logits_fn(torch.full_like(subject.images[:1], 0.5)).argmax(1)
    share = _mean(subject.standing(far) & (subject.labels != grey))
    statement = f"{share:.1%} stand at epsilon {radius:.3g}, where they can be turned grey, which is of another class"
    return _check("accuracy_at_large_epsilon", share, statement)


def _steps(subject: _Subject, iterative: float, attacked: Tensor) -> list[Check]:
    """`attacked` are the images after the attack."""
    steps = subject.attack.num_steps
    further = subject.attacked(replace(subject.attack, num_steps=3 * steps), attacked)
    more = _mean(subject.standing(further))
    clean, now, then = map(subject.loss, (subject.images, attacked, further))
    rise = (then - now) / max(now - clean, 1e-12) if then > now else 0.0
    counts = f"{steps} and {4 * steps} steps"
    statement = f"{iterative:.1%} and {more:.1%} stand after {counts}"
    losses = f"mean loss {clean:.3g} clean, {now:.3g} and {then:.3g} after {counts}"
    return [
        _check("more_steps_not_weaker", more - iterative, statement),
        _check("more_steps_gain_little", iterative - more, statement),
        _check("loss_has_settled", rise, losses),
    ]


def _gradients(subject: _Subject) -> Check:
    def norms(images: Tensor, labels: Tensor) -> Tensor:
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            total = F.cross_entropy(subject.logits_fn(images), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(total, images)
        # In double: squares of small numbers, along whose signs attacks move all the same, vanish in float32.
        return gradient.flatten(1).double().norm(dim=1)

    lengths = torch.cat([norms(x, y) for x, y in subject.batches()])
    share = _mean((lengths == 0) | ~lengths.isfinite())
    statement = f"{share:.1%} of the images have no gradient; the median length is {float(lengths.median()):.3g}"
    return _check("gradients_do_not_vanish", share, statement)


def _bfloat16(subject: _Subject, attacked: Tensor) -> Check:
    def agrees(images: Tensor) -> Tensor:
        with torch.no_grad():
            exact = subject.logits_fn(images).argmax(1)
            with autocast("bfloat16", images.device):
                return subject.logits_fn(images).argmax(1) == exact

    share = _mean(torch.cat([agrees(x) for x, _ in subject.batches(attacked)]))
    statement = f"both predict the same class on {share:.1%} of the attacked images"
    return _check("bfloat16_agrees_with_float32", share, statement)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
