"""The checks of the audit, one a function.

Sources: Athalye, Carlini and Wagner 2018, section 3.1; Carlini et al. 2019, "On evaluating adversarial robustness";
Tramer et al. 2020. Thresholds are settings of this project, wide enough for the noise of some hundred images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, Attack, LogitsFn, attack_images, craft
from tla_service.attacks.autoattack import run_autoattack
from tla_service.evaluation.mode import logits_of
from tla_service.runtime import autocast, generator

# Attacks made on a network that knows much less than the model say nothing about the model.
_LEAST_SURROGATE = 0.5


@dataclass(frozen=True)
class Thresholds:
    """When a check fails; all are shares of images but one.

    Attributes:
        weaker: Most by which an attack that should be the stronger may leave more images standing.
        square: Most images that stand after the iterative attack and fall to Square.
        far: Most images that may stand when the radius covers every image.
        more_steps: Most that four times the steps may gain.
        rising_loss: Most that four times the steps may add to the loss, as a share of what the attack had added.
        zero_gradient: Most images whose gradient is zero.
        restarts: Most that ten starts may gain over one.
        margin: Most that ascending the logit margin may gain over ascending the cross-entropy.
        bfloat16: Fewest attacked images on which bfloat16 agrees with float32.
    """

    weaker: float = 0.01
    square: float = 0.02
    far: float = 0.01
    more_steps: float = 0.03
    rising_loss: float = 0.25
    zero_gradient: float = 0.01
    restarts: float = 0.05
    margin: float = 0.05
    bfloat16: float = 0.97


Outcome = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What is checked.
        figure: What was measured; None when the check was not run.
        threshold: Where it fails.
        outcome: What came of it.
        statement: The figure in words, or why the check was not run.
        meaning: What a failure means.
    """

    name: str
    figure: float | None
    threshold: float
    outcome: Outcome
    statement: str
    meaning: str


@dataclass(frozen=True)
class Subject:
    """What the checks measure on."""

    logits_fn: LogitsFn
    images: Tensor
    labels: Tensor
    seed: int
    batch_size: int

    def random(self) -> torch.Generator:
        """A generator in the same state each time: attacks that are compared begin at the same points."""
        return generator(self.images.device, self.seed)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Images and labels, a forward pass at a time."""
        return list(zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True))

    def accuracy(self, logits_fn: LogitsFn) -> float:
        """Share of clean images that a network classifies correctly."""
        with torch.no_grad():
            return share_of(self.over_batches(lambda x, y: logits_fn(x).argmax(1) == y, self.images))

    def fates(self, attack: Attack, crafted_on: LogitsFn | None = None) -> Tensor:
        """Which restart breaks each image first (N,)."""
        random = self.random()
        return torch.cat(
            [attack_images(self.logits_fn, x, y, attack, random, crafted_on).broken_at for x, y in self.batches()]
        )

    def standing(self, attack: Attack, crafted_on: LogitsFn | None = None) -> float:
        """Share of images that stand."""
        return share_of(self.fates(attack, crafted_on) == UNBROKEN)

    def attacked(self, attack: Attack) -> Tensor:
        """Images (N, C, H, W) after one start."""
        random = self.random()
        return torch.cat([craft(self.logits_fn, x, y, attack, random) for x, y in self.batches()])

    def over_batches(self, measure: Callable[[Tensor, Tensor], Tensor], images: Tensor) -> Tensor:
        """A measure of images and labels, batch by batch (N,)."""
        parts = zip(images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        return torch.cat([measure(x, y) for x, y in parts])


def single_step(subject: Subject, attack: Attack, iterative: float, limits: Thresholds) -> Check:
    """Iterative attacks should be at least as strong as a single step."""
    single = subject.standing(replace(attack, kind="fgsm"))
    return _at_most(
        "iterative_against_single_step",
        iterative - single,
        limits.weaker,
        f"{iterative:.1%} stand after {attack.num_steps} steps, {single:.1%} after one",
        "many small steps do worse than one large step: gradients near the images mislead",
    )


def transfer(
    subject: Subject, attack: Attack, iterative: float, surrogate: nn.Module | str, limits: Thresholds
) -> Check:
    """White-box attacks should be at least as strong as attacks made on another network, or why there is none."""
    name, meaning = (
        "white_box_against_transfer",
        "an attacker who does not know the network does better than one who does: its gradients hide the way",
    )
    if isinstance(surrogate, str):
        return _not_run(name, limits.weaker, surrogate, meaning)
    crafted_on = logits_of(surrogate)
    right, other = (subject.accuracy(logits_fn) for logits_fn in (subject.logits_fn, crafted_on))
    if other < _LEAST_SURROGATE * right:
        why = f"the surrogate classifies only {other:.1%} of the images correctly, the model {right:.1%}"
        return _not_run(name, limits.weaker, why, meaning)
    transferred = subject.standing(attack, crafted_on)
    statement = (
        f"{iterative:.1%} stand in the white box, {transferred:.1%} after transfer from a surrogate with "
        f"{other:.1%} clean accuracy"
    )
    return _at_most(name, iterative - transferred, limits.weaker, statement, meaning)


def square(subject: Subject, attack: Attack, standing: Tensor, queries: int, limits: Thresholds) -> Check:
    """White-box attacks should leave little to a search without gradients."""
    name, meaning = (
        "white_box_against_square",
        "a search without gradients finds what gradients do not: they are masked",
    )
    fell = 0
    if standing.any():
        result = run_autoattack(
            subject.logits_fn,
            subject.images[standing],
            subject.labels[standing],
            norm=attack.norm,
            epsilon=attack.epsilon,
            seed=subject.seed,
            batch_size=subject.batch_size,
            only=("square",),
            square_queries=queries,
        )
        if "square" in result.left_out:
            return _not_run(name, limits.square, result.left_out["square"], meaning)
        fell = int((~result.robust).sum())
    statement = (
        f"Square's {queries} queries break {fell} of {int(standing.sum())} images that the white-box attack leaves"
    )
    return _at_most(name, fell / len(standing), limits.square, statement, meaning)


def far(subject: Subject, attack: Attack, limits: Thresholds) -> Check:
    """With a radius that covers every image, nothing should stand."""
    # Within this radius lies mid-grey, whatever the image: nothing can be told there.
    pixels = math.prod(subject.images.shape[1:])
    radius = max(attack.epsilon, 0.5 if attack.norm == "linf" else 0.5 * math.sqrt(pixels))
    steps = max(50, attack.num_steps)
    share = subject.standing(replace(attack, epsilon=radius, step_size=radius / 10, num_steps=steps))
    return _at_most(
        "accuracy_at_large_epsilon",
        share,
        limits.far,
        f"{share:.1%} stand at epsilon {radius:.3g}, where every image can be turned grey",
        "no network can be right there, so the attack does not find its way",
    )


def steps(subject: Subject, attack: Attack, iterative: float, limits: Thresholds) -> list[Check]:
    """More steps should neither lose nor gain much, and the loss should have settled."""
    longer = replace(attack, num_steps=4 * attack.num_steps)
    more = subject.standing(longer)

    def loss(images: Tensor) -> float:
        def measure(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                return F.cross_entropy(subject.logits_fn(x), y, reduction="none")

        return float(subject.over_batches(measure, images).double().mean())

    clean, now, then = loss(subject.images), loss(subject.attacked(attack)), loss(subject.attacked(longer))
    rise = (then - now) / max(now - clean, 1e-12) if then > now else 0.0
    counts = f"{attack.num_steps} and {longer.num_steps} steps"
    return [
        _at_most(
            "more_steps_not_weaker",
            more - iterative,
            limits.weaker,
            f"{iterative:.1%} and {more:.1%} stand after {counts}",
            "the attack loses its way as it goes on: the loss surface is broken up",
        ),
        _at_most(
            "more_steps_gain_little",
            iterative - more,
            limits.more_steps,
            f"{iterative:.1%} and {more:.1%} stand after {counts}",
            "the attack was stopped early; with more steps the reported robustness falls",
        ),
        _at_most(
            "loss_has_settled",
            rise,
            limits.rising_loss,
            f"mean loss {clean:.3g} clean, {now:.3g} and {then:.3g} after {counts}",
            "the loss still rises steeply when the attack ends; use more or longer steps",
        ),
    ]


def gradients(subject: Subject, limits: Thresholds) -> Check:
    """Gradients should not vanish."""

    def norms(images: Tensor, labels: Tensor) -> Tensor:
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            total = F.cross_entropy(subject.logits_fn(images), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(total, images)
        return gradient.flatten(1).norm(dim=1)

    lengths = subject.over_batches(norms, subject.images)
    share = share_of((lengths == 0) | ~lengths.isfinite())
    return _at_most(
        "gradients_do_not_vanish",
        share,
        limits.zero_gradient,
        f"{share:.1%} of the images have no gradient; the median length is {float(lengths.median()):.3g}",
        "gradient attacks stand still on these images and call them robust",
    )


def restarts(subject: Subject, attack: Attack, limits: Thresholds) -> Check:
    """Restarts should gain little."""
    fates = subject.fates(replace(attack, num_restarts=10, random_start=True))
    first, last = share_of((fates == UNBROKEN) | (fates > 1)), share_of(fates == UNBROKEN)
    return _at_most(
        "restarts_gain_little",
        first - last,
        limits.restarts,
        f"{first:.1%} stand after one start, {last:.1%} after ten",
        "where the attack begins decides what it finds: the loss surface is rough, and one start overstates robustness",
    )


def margin(subject: Subject, attack: Attack, iterative: float, limits: Thresholds) -> Check:
    """The choice of the loss should matter little."""
    margin = subject.standing(replace(attack, kind="cw"))
    return _at_most(
        "cross_entropy_against_margin",
        iterative - margin,
        limits.margin,
        f"{iterative:.1%} stand when the cross-entropy is ascended, {margin:.1%} when the logit margin is",
        "the softmax saturates and hides the gradient; large logits make the cross-entropy a poor guide",
    )


def bfloat16(subject: Subject, attack: Attack, limits: Thresholds) -> Check:
    """Rounding should not matter."""
    attacked = subject.attacked(attack)

    def agrees(images: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            exact = subject.logits_fn(images).argmax(1)
            with autocast("bfloat16", images.device):
                return subject.logits_fn(images).argmax(1) == exact

    share = share_of(subject.over_batches(agrees, attacked))
    return Check(
        "bfloat16_agrees_with_float32",
        share,
        limits.bfloat16,
        "passed" if share >= limits.bfloat16 else "failed",
        f"both predict the same class on {share:.1%} of the attacked images",
        "predictions hang on rounding: small numerical noise stands in for robustness",
    )


def _at_most(name: str, figure: float, threshold: float, statement: str, meaning: str) -> Check:
    return Check(name, figure, threshold, "passed" if figure <= threshold else "failed", statement, meaning)


def _not_run(name: str, threshold: float, why: str, meaning: str) -> Check:
    return Check(name, None, threshold, "not run", why, meaning)


def share_of(flags: Tensor) -> float:
    """The share of True (N,)."""
    return float(flags.double().mean())
