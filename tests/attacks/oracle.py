"""One image at a time, one pixel at a time: what the attacks should do, in plain Python."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tla_service.attacks import Attack, LogitsFn

Image = list[float]
SHAPE = (2, 2, 3)


def batch() -> tuple[Tensor, Tensor]:
    """Five random images, and labels of four classes."""
    return torch.rand(5, *SHAPE, dtype=torch.float64), torch.randint(4, (5,))


def cross_entropy(logits: Tensor, label: int, smoothing: float) -> Tensor:
    """Of one image's logits (K,)."""
    highest = max(logits.tolist())
    log_total = highest + sum((z - highest).exp() for z in logits).log()  # type: ignore[union-attr]
    classes = len(logits)
    total = torch.zeros((), dtype=logits.dtype)
    for k in range(classes):
        share = smoothing / classes + (1 - smoothing if k == label else 0)
        total = total - share * (logits[k] - log_total)
    return total


def logit_margin(logits: Tensor, label: int, confidence: float = 50) -> Tensor:
    """C&W in the authors' evaluation code: -ReLU(z_y - max of the others + 50)."""
    best_wrong = max((logits[k] for k in range(len(logits)) if k != label), key=lambda z: z.item())
    margin = logits[label] - best_wrong + confidence
    return -margin if margin > 0 else 0 * margin


def gradient_of(logits_fn: LogitsFn, pixels: Image, shape: Sequence[int], label: int, attack: Attack) -> Image:
    image = torch.tensor(pixels, dtype=torch.float64).view(1, *shape).requires_grad_()
    logits = logits_fn(image)[0]
    loss = logit_margin(logits, label) if attack.kind == "cw" else cross_entropy(logits, label, attack.label_smoothing)
    (gradient,) = torch.autograd.grad(loss, image)
    return gradient.flatten().tolist()


def length(values: Image) -> float:
    return math.sqrt(math.fsum(v * v for v in values))


def direction(gradient: Image, norm: str) -> Image:
    if norm == "linf":
        return [math.copysign(1, g) if g else 0.0 for g in gradient]
    total = length(gradient)
    return [g / total if total else 0.0 for g in gradient]


def project(clean: Image, pixels: Image, attack: Attack) -> Image:
    offsets = [p - c for p, c in zip(pixels, clean, strict=True)]
    if attack.norm == "linf":
        offsets = [min(max(offset, -attack.epsilon), attack.epsilon) for offset in offsets]
    elif length(offsets) > attack.epsilon:
        factor = attack.epsilon / length(offsets)
        offsets = [offset * factor for offset in offsets]
    return [min(max(c + offset, 0.0), 1.0) for c, offset in zip(clean, offsets, strict=True)]


def attack_one(logits_fn: LogitsFn, clean: Tensor, start: Tensor, label: int, attack: Attack) -> Tensor:
    """Attack one image (C, H, W), float64, from `start`."""
    original, pixels = clean.flatten().tolist(), start.flatten().tolist()
    steps, step_size = (1, attack.epsilon) if attack.kind == "fgsm" else (attack.num_steps, attack.step_size)
    velocity = [0.0] * len(pixels)
    for _ in range(steps):
        gradient = gradient_of(logits_fn, pixels, clean.shape, label, attack)
        if attack.kind == "mim":
            mean = math.fsum(abs(g) for g in gradient) / len(gradient)
            velocity = [attack.momentum * v + g / mean for v, g in zip(velocity, gradient, strict=True)]
            gradient = velocity
        step = direction(gradient, attack.norm)
        pixels = project(original, [p + step_size * s for p, s in zip(pixels, step, strict=True)], attack)
    return torch.tensor(pixels, dtype=torch.float64).view_as(clean)


def recording(logits_fn: LogitsFn) -> tuple[LogitsFn, list[Tensor]]:
    """The same function, and the batches it was asked about."""
    asked: list[Tensor] = []

    def recorded(images: Tensor) -> Tensor:
        asked.append(images.detach().clone())
        return logits_fn(images)

    return recorded, asked


def small_network(shape: Sequence[int], classes: int, scale: float = 3.0, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A smooth network without flat regions or kinks, in the images' own precision."""
    random = torch.Generator().manual_seed(seed)
    pixels = math.prod(shape)
    hidden = torch.randn(pixels, 8, generator=random, dtype=torch.float64) / math.sqrt(pixels)
    output = torch.randn(8, classes, generator=random, dtype=torch.float64) * scale

    def logits(images: Tensor) -> Tensor:
        features = (2 * (images - 0.5).flatten(1) @ hidden.to(images.dtype)).tanh()
        return features @ output.to(images.dtype)

    return logits
