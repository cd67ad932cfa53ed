"""Is the robustness real? Checks for gradient masking, each with its figure, threshold and meaning."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, Attack
from tla_service.evaluation import audit_checks as checks
from tla_service.evaluation.audit_checks import Thresholds
from tla_service.evaluation.mode import as_pixels, evaluating, float32, logits_of
from tla_service.evaluation.results import Audit
from tla_service.evaluation.suite import clean_logits


def audit(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    surrogate: nn.Module | None,
    no_surrogate: str = "there is no surrogate",
    seed: int,
    batch_size: int,
    device: torch.device,
    thresholds: Thresholds | None = None,
    square_queries: int = 1000,
) -> Audit:
    """Look for signs that attacks fail on a network for other reasons than its robustness.

    Args:
        network: The bare network, on the device; gives ``.logits``. Its mode is restored.
        images: Test images (N, C, H, W), uint8 or float in [0, 1]; some hundred are enough.
        labels: True classes (N,), int64.
        attack: The iterative white-box attack that the report rests on; one start of it is the measure.
        surrogate: An independently trained network to transfer attacks from; without one that check is not run.
        no_surrogate: Why there is none.
        seed: Fixes every draw.
        batch_size: Images a forward pass.
        device: Where the network is.
        thresholds: When checks fail.
        square_queries: Queries of the Square attack.

    Raises:
        ConfigError: The network cannot take the images, or gives logits that are not finite.
    """
    one = replace(attack, kind="pgd", num_restarts=1)
    with evaluating(network, surrogate), float32(device):
        subject = checks.Subject(
            logits_of(network),
            as_pixels(images, device),
            labels.to(device),
            seed,
            batch_size,
            thresholds or Thresholds(),
        )
        for x, y in subject.batches():
            clean_logits(subject.logits_fn, x, y)
        standing = subject.broken_at(one) == UNBROKEN
        iterative = checks.mean_of(standing)
        results = [
            checks.single_step(subject, one, iterative),
            checks.transfer(subject, one, iterative, surrogate or no_surrogate),
            checks.square(subject, one, standing, square_queries),
            checks.far(subject, one),
            *checks.steps(subject, one, iterative),
            checks.gradients(subject),
            checks.restarts(subject, one),
            checks.margin(subject, one, iterative),
            checks.bfloat16(subject, one),
        ]
    return Audit.of(results, len(labels))
