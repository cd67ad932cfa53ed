"""One gradient loop for FGSM, BIM, PGD, MIM and the L-infinity margin form of C&W.

Definitions: Mao et al. 2019, section 2; C&W's margin as in the authors' evaluation code (kappa = 50).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tla_service.errors import ConfigError
from tla_service.runtime import uniform_noise, wide

LogitsFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """What an adversary may do, and how hard it tries.

    Attributes:
        kind: `fgsm` is one step of length epsilon; `bim` iterates without a random start; `mim` adds momentum; `cw`
            ascends the margin between the best wrong class and the true one.
        norm: Norm of the perturbation.
        epsilon: Radius: in pixels of [0, 1] for L-infinity, a length for L2. In (0, inf).
        step_size: Length of one step, in the same unit.
        num_steps: Gradient steps, at least 1.
        num_restarts: Random starts tried on each image.
        random_start: Start at a uniform point of the ball instead of the clean image (`pgd`, `mim` and `cw`).
        momentum: Share of the running gradient that `mim` keeps.
        label_smoothing: Smoothing of the cross-entropy that is ascended.
        objective: `kl` ascends the divergence of the prediction from that on the clean image instead of the
            cross-entropy, starting a hair's breadth away from it (TRADES: Zhang et al. 2019, algorithm 1).
        function: Takes the place of the loop: a function with the signature of `craft`, which gets the attack without
            it. What it returns is projected onto the ball and [0, 1]. `kind` is then its name.
    """

    kind: str = "pgd"
    norm: Literal["linf", "l2"] = "linf"
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    num_steps: int = 7
    num_restarts: int = 1
    random_start: bool = True
    momentum: float = 1.0
    label_smoothing: float = 0.0
    objective: Literal["cross_entropy", "kl"] = "cross_entropy"
    function: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def starts_at_random(self) -> bool:
        """Whether a draw is involved; without one, restarts would repeat themselves."""
        return self.random_start and self.kind not in ("fgsm", "bim")


UNBROKEN = -1
# The logit margin is held below this confidence (authors' code); beyond it the attack stops pushing.
CW_CONFIDENCE = 50.0
# At the clean image itself the divergence has no gradient: TRADES starts at this times a normal draw from it.
_KL_START = 0.001


def craft(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    generator: torch.Generator | None = None,
    *,
    skip_repeats: bool = False,
) -> Tensor:
    """Attack a batch once, from one start.

    Only the gradient to the images is asked for, so no parameter's `.grad` is touched. Whether BatchNorm uses running
    statistics is the caller's: pass the bare module in eval mode, never a DDP wrapper.

    Args:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits (N, K).
        images: Clean images (N, C, H, W), float, in [0, 1].
        labels: True classes (N,), int64.
        attack: The adversary.
        generator: Source of the random start, on the images' device.
        skip_repeats: Use `climb_until_repeated`, which gives the same images sooner.

    Returns:
        Adversarial images (N, C, H, W) in [0, 1], within `attack.epsilon` of `images`; detached.
    """
    if attack.function is not None:
        return projection(images.detach(), attack)(craft_freely(logits_fn, images, labels, attack, generator))
    steps = climb_until_repeated if skip_repeats else climb
    return steps(logits_fn, images, starting_point(images, attack, generator), labels, attack)


def craft_freely(
    logits_fn: LogitsFn, images: Tensor, labels: Tensor, attack: Attack, generator: torch.Generator | None = None
) -> Tensor:
    """As `craft`, for an attack with a function, without the projection; ConfigError for another type or shape."""
    assert attack.function is not None
    plain = replace(attack, kind="pgd", function=None)
    with torch.enable_grad():
        found = attack.function(logits_fn, images.detach().clone(), labels, plain, generator)
    if not isinstance(found, Tensor) or found.shape != images.shape:
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        reason = f"returned {shown} for images {tuple(images.shape)}"
        raise ConfigError("attack", attack.kind, reason, "return the adversarial images, as a tensor of that shape")
    return found.detach().to(images.dtype, copy=True)


def starting_point(images: Tensor, attack: Attack, generator: torch.Generator | None = None) -> Tensor:
    """Where the attack starts: a random point of the ball and of [0, 1], or the images themselves."""
    images = images.detach()
    if not attack.starts_at_random:
        return images
    return (images + _random_perturbation(images, attack, generator)).clamp(0, 1)


def climb(logits_fn: LogitsFn, images: Tensor, start: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    """The steps of `craft`, from a given start; draws nothing and never waits for the device."""
    images = images.detach()
    steps, step_size = (1, attack.epsilon) if attack.kind == "fgsm" else (attack.num_steps, attack.step_size)
    adversarial = start
    velocity = torch.zeros_like(images) if attack.kind == "mim" else None
    project = projection(images, attack)
    clean = None
    if attack.objective == "kl":
        with torch.no_grad():
            clean = F.log_softmax(wide(logits_fn(images)), dim=1)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        with torch.enable_grad():
            loss = _loss(logits_fn(adversarial), labels, attack, clean)
            (gradient,) = torch.autograd.grad(loss, adversarial)
        if velocity is not None:
            velocity = attack.momentum * velocity + gradient / _per_image(gradient.abs().mean((1, 2, 3)))
            gradient = velocity
        # In place: the direction is a tensor of its own, and nothing else of its size need be written.
        adversarial = project(direction(gradient, attack).mul_(step_size).add_(adversarial.detach()))
    return adversarial.detach()


def climb_until_repeated(logits_fn: LogitsFn, images: Tensor, start: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    """As `climb`, without the steps of images that have begun to alternate between two points, or stand still.

    Steps of one length in L-infinity end so on many images. What would follow is known then, unless steps depend on
    earlier ones (`mim`). Waits for the device at every step.
    """
    if attack.kind not in ("pgd", "bim", "cw") or attack.objective != "cross_entropy" or attack.norm != "linf":
        return climb(logits_fn, images, start, labels, attack)
    one = replace(attack, num_steps=1)
    result, rows = start.clone(), torch.arange(len(start), device=start.device)
    before, here = None, start
    for left in reversed(range(attack.num_steps)):
        following = climb(logits_fn, images, here, labels, one)
        if before is not None:
            repeats = (following == before).flatten(1).all(1)
            if repeats.any():
                result[rows[repeats]] = (here if left % 2 else following)[repeats]
                going = ~repeats
                rows, images, labels = rows[going], images[going], labels[going]
                here, following = here[going], following[going]
                if not len(rows):
                    return result
        before, here = here, following
    result[rows] = here
    return result


def craft_noisy_step(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    noise: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """N-FGSM (de Jorge et al. 2022): noise, then one step of length epsilon, without a projection back to the ball.

    For L-infinity; `noise` is the half width of the uniform noise in epsilons (the paper's k), other arguments are
    those of `craft`. Returns detached images (N, C, H, W) in [0, 1], within (noise + 1) epsilons of `images`.
    """
    images = images.detach()
    noisy = (images + uniform_noise(images, noise, generator) * attack.epsilon).clamp(0, 1)
    step = replace(attack, kind="pgd", epsilon=torch.inf, step_size=attack.epsilon, num_steps=1)
    return climb(logits_fn, images, noisy, labels, step)


class Attacked(NamedTuple):
    """Images after an attack with restarts.

    `images` (N, C, H, W) are the worst result of each; clean where misclassified without an attack. `broken_at` (N,),
    int64, is 0 there, r where the r-th restart is the first to break the image, `UNBROKEN` where none does.
    """

    images: Tensor
    broken_at: Tensor

    @property
    def robust(self) -> Tensor:
        """Whether each image is still classified correctly (N,), bool."""
        return self.broken_at == UNBROKEN


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified correctly (N,), bool: not if its logits (N, K) have NaN, whose argmax is 0."""
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def attack_images(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    generator: torch.Generator | None = None,
    crafted_on: LogitsFn | None = None,
) -> Attacked:
    """Attack with all restarts and keep the worst result of each image.

    Restarts only attack images that are not broken yet; among results that do not break an image, the one with the
    highest loss is kept. Arguments are those of `craft`; `crafted_on` is the network whose gradients are followed (a
    transfer attack), by default the one under attack.
    """
    images = images.detach()
    with torch.no_grad():
        broken_at = torch.where(is_right(logits_fn(images), labels), UNBROKEN, 0)
    worst = images.clone()
    highest = torch.full(labels.shape, -torch.inf, dtype=images.dtype, device=images.device)
    for restart in range(1, (attack.num_restarts if attack.starts_at_random else 1) + 1):
        standing = (broken_at == UNBROKEN).nonzero().squeeze(1)
        if len(standing) == 0:
            break
        targets = labels[standing]
        adversarial = craft(crafted_on or logits_fn, images[standing], targets, attack, generator, skip_repeats=True)
        if attack.function is not None and not adversarial.isfinite().all():
            # NaN would count as a broken image.
            raise ConfigError("attack", attack.kind, "returned pixels that are not finite", "correct the attack")
        with torch.no_grad():
            logits = logits_fn(adversarial)
            broken = ~is_right(logits, targets)
            loss = F.cross_entropy(logits, targets, reduction="none").to(highest.dtype)
        better = broken | (loss > highest[standing])
        worst[standing[better]] = adversarial[better]
        highest[standing[better]] = loss[better]
        broken_at[standing[broken]] = restart
    return Attacked(worst, broken_at)


def _loss(logits: Tensor, labels: Tensor, attack: Attack, clean: Tensor | None) -> Tensor:
    """What the attack ascends, summed over the batch; in float32 or wider, also under autocast."""
    logits = wide(logits)
    if clean is not None:
        return F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="sum", log_target=True)
    if attack.kind != "cw":
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=attack.label_smoothing)
    true = logits.gather(1, labels[:, None]).squeeze(1)
    is_true = F.one_hot(labels, logits.shape[1]).bool()
    best_wrong = logits.masked_fill(is_true, -torch.inf).amax(1)
    return -F.relu(true - best_wrong + CW_CONFIDENCE).sum()


def _random_perturbation(images: Tensor, attack: Attack, generator: torch.Generator | None) -> Tensor:
    """A draw from the ball, uniform in the cube (L-infinity) or in the ball's volume (L2); tiny for `kl`."""
    if attack.objective == "kl":
        return _KL_START * torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    if attack.norm == "linf":
        return uniform_noise(images, attack.epsilon, generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    radius = torch.rand(len(images), generator=generator, device=images.device, dtype=images.dtype)
    length = noise.flatten(1).norm(dim=1)
    return noise * _per_image(attack.epsilon * radius ** (1 / images.shape[1:].numel()) / length)


def direction(gradient: Tensor, attack: Attack) -> Tensor:
    """The steepest step of length one under the attack's norm; zero where the gradient is zero."""
    if attack.norm == "linf":
        return gradient.sign()
    # What is not a number moves nothing, as its sign above does: images that became NaN would count as broken.
    gradient = gradient.nan_to_num()
    # A saturated network's gradient can be so small that its squares vanish: bring its largest entry to one first.
    scaled = gradient / _per_image(gradient.abs().amax((1, 2, 3)))
    return scaled / _per_image(scaled.flatten(1).norm(dim=1))


def projection(images: Tensor, attack: Attack) -> Callable[[Tensor], Tensor]:
    """To the nearest point of the ball around `images`, then of [0, 1]; clipping to [0, 1] never leaves the ball."""
    if attack.norm == "linf":
        # Two intervals that both hold the image: one clamp to what they share.
        lowest, highest = (images - attack.epsilon).clamp_min(0), (images + attack.epsilon).clamp_max(1)
        return lambda adversarial: adversarial.clamp_(lowest, highest)

    def project(adversarial: Tensor) -> Tensor:
        perturbation = adversarial - images
        length = perturbation.flatten(1).norm(dim=1)
        # Written out, so that a radius in a tensor rounds as a number does: that is what dividing a number computes.
        scale = (length.clamp_min(attack.epsilon).reciprocal() * attack.epsilon).clamp(max=1)
        return (images + perturbation * _per_image(scale)).clamp(0, 1)

    return project


def _per_image(values: Tensor) -> Tensor:
    """(N,) to (N, 1, 1, 1), kept away from zero so that it can divide."""
    return values.clamp_min(torch.finfo(values.dtype).tiny)[:, None, None, None]
