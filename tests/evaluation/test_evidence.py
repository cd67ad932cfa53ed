"""Images moved into the ball to the last bit."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tla_service.evaluation.evidence import into_ball


def is_outside(clean: Tensor, adversarial: Tensor, norm: str, epsilon: float) -> npt.NDArray[np.bool_]:
    """Whether images (N, C, H, W) are outside [0, 1] or the ball (N,), in float64 and without tolerance."""
    exact = adversarial.numpy().astype(np.float64)
    delta = (exact - clean.numpy().astype(np.float64)).reshape(len(exact), -1)
    distance = np.linalg.norm(delta, ord=math.inf if norm == "linf" else 2, axis=1)
    return ~(distance <= epsilon) | ~((exact >= 0) & (exact <= 1)).all((1, 2, 3))


@pytest.mark.parametrize(
    ("norm", "epsilon"), [("linf", 0.1), ("linf", 8 / 255), ("linf", 0.5), ("l2", 0.5), ("l2", 1e-6)]
)
def test_images_at_the_edge_are_inside_in_exact_arithmetic(norm: str, epsilon: float) -> None:
    draws = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (20, 3, 8, 8), generator=draws).float() / 255
    step = torch.randn(clean.shape, generator=draws)
    if norm == "linf":
        attacked = torch.max(torch.min(clean + epsilon * step.sign(), clean + epsilon), clean - epsilon).clamp(0, 1)
    else:
        attacked = (clean + epsilon * step / step.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
    assert is_outside(clean, attacked, norm, epsilon).any() or epsilon == 0.5
    inside = into_ball(clean, attacked, norm, epsilon)  # type: ignore[arg-type]
    assert inside.dtype == torch.float32
    assert not is_outside(clean, inside, norm, epsilon).any()
    assert (inside - attacked).abs().max() <= 1.2e-7
    assert torch.equal(into_ball(clean, inside, norm, epsilon), inside)  # type: ignore[arg-type]

    attacked[3, 0, 1, 1], attacked[4, 0, 1, 1], attacked[5] = math.nan, math.inf, 1 - clean[5]
    inside = into_ball(clean, attacked, norm, epsilon)  # type: ignore[arg-type]
    assert not is_outside(clean, inside, norm, epsilon).any()
    assert inside[3, 0, 1, 1] == clean[3, 0, 1, 1] or norm == "l2"
