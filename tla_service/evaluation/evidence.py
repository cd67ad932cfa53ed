"""AutoAttack's images for others to check: moved into the ball to the last bit, and classified once more as stored."""

import torch
from torch import Tensor, nn

from tla_service.config.radii import Norm
from tla_service.evaluation.shards import Arrays


def adversarial_arrays(network: nn.Module, clean: Tensor, adversarial: Tensor, norm: Norm, epsilon: float) -> Arrays:
    """What is published of adversarial and clean images (N, C, H, W), float32 in [0, 1], by name.

    ``adversarial`` are those moved into the ball, ``clean`` the clean images, and ``attacked`` the classes (N,) that
    the network, in eval mode, predicts for the former in one more forward pass.
    """
    inside = into_ball(clean, adversarial, norm, epsilon)
    with torch.no_grad():
        attacked = network(inside).logits.argmax(1)
    return {"clean": clean.cpu().numpy(), "adversarial": inside.cpu().numpy(), "attacked": attacked.cpu().numpy()}


def into_ball(clean: Tensor, adversarial: Tensor, norm: Norm, epsilon: float) -> Tensor:
    """Move images (N, C, H, W), float32, into the ball and into [0, 1], as computed in float64 and without tolerance.

    Attacks compute x + epsilon in float32, which rounds up for about half of all pixels. NaN becomes the clean pixel.
    """
    exact, moved = clean.double(), torch.where(adversarial.isnan(), clean, adversarial).clamp(0, 1)
    if norm == "linf":
        moved = moved.clamp((exact - epsilon).float(), (exact + epsilon).float())
        return torch.where((moved.double() - exact).abs() > epsilon, moved.nextafter(clean), moved)
    # Float32 may round a scaled image out of the ball again: from one try to the next it is scaled twice as much.
    for power in range(-24, 1):
        delta = moved.double() - exact
        lengths = delta.flatten(1).norm(dim=1)[:, None, None, None]
        if not (lengths > epsilon).any():
            break
        scaled = (exact + (1 - 2.0**power) * epsilon / lengths * delta).float()
        moved = torch.where(lengths > epsilon, scaled, moved)
    return moved
