"""Images moved into the ball to the last bit."""

import pytest
import torch

from tla_service.evaluation.evidence import into_ball, is_outside


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
    assert is_outside(clean.numpy(), attacked.numpy(), norm, epsilon).any() or epsilon == 0.5  # type: ignore[arg-type]
    inside = into_ball(clean, attacked, norm, epsilon)  # type: ignore[arg-type]
    assert inside.dtype == torch.float32
    assert not is_outside(clean.numpy(), inside.numpy(), norm, epsilon).any()  # type: ignore[arg-type]
    assert (inside - attacked).abs().max() <= 1.2e-7
    assert torch.equal(into_ball(clean, inside, norm, epsilon), inside)  # type: ignore[arg-type]
