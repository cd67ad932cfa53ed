"""Is the robustness real? Checks for gradient masking, each with its figure, threshold and meaning."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, Attack
from tla_service.evaluation import audit_checks as checks
from tla_service.evaluation.audit_checks import Check, Thresholds
from tla_service.evaluation.mode import as_pixels, evaluating, float32, logits_of
from tla_service.evaluation.suite import clean_logits

__all__ = ["Audit", "Check", "Thresholds", "audit"]


@dataclass(frozen=True)
class Audit:
    """All checks of a network.

    Attributes:
        checks: In the order of running.
        images: How many images they were measured on.
    """

    checks: tuple[Check, ...]
    images: int

    @property
    def trusted(self) -> bool:
        """Whether no check failed. One that was not run says nothing, and is shown as such."""
        return all(check.outcome != "failed" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        return {"trusted": self.trusted, "images": self.images, "checks": [asdict(check) for check in self.checks]}


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
    limits = thresholds or Thresholds()
    one = replace(attack, kind="pgd", num_restarts=1)
    with evaluating(network, surrogate), float32(device):
        subject = checks.Subject(logits_of(network), as_pixels(images, device), labels.to(device), seed, batch_size)
        for x, y in subject.batches():
            clean_logits(subject.logits_fn, x, y)
        fates = subject.fates(one)
        iterative = checks.share_of(fates == UNBROKEN)
        results = [
            checks.single_step(subject, one, iterative, limits),
            checks.transfer(subject, one, iterative, surrogate or no_surrogate, limits),
            checks.square(subject, one, fates == UNBROKEN, square_queries, limits),
            checks.far(subject, one, limits),
            *checks.steps(subject, one, iterative, limits),
            checks.gradients(subject, limits),
            checks.restarts(subject, one, limits),
            checks.margin(subject, one, iterative, limits),
            checks.bfloat16(subject, one, limits),
        ]
    return Audit(tuple(results), len(labels))
