"""Loss terms on logits and embeddings, per image, in float32 or wider."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tla_service.runtime import wide


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (N, K) with labels (N,), or shares of classes (N, K): (N,)."""
    return F.cross_entropy(wide(logits), labels, reduction="none", label_smoothing=label_smoothing)


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL(p || q) of the clean prediction p and the adversarial q, logits (N, K) twice to (N,).

    Gradients flow into both, as in TRADES (Zhang et al. 2019, equation 5) and MART (Wang et al. 2020, equation 10).
    """
    logs = (F.log_softmax(wide(logits), dim=1) for logits in (adversarial, clean))
    return F.kl_div(next(logs), next(logs), reduction="none", log_target=True).sum(1)


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - the highest wrong probability), (N, K) to (N,): MART's boost (Wang et al. 2020, equation 8).

    Summed from the other classes' probabilities, so that it stays finite when a wrong class is almost certain.
    """
    logs = F.log_softmax(wide(logits), dim=1)
    wrong = logs.scatter(1, labels[:, None], -torch.inf).argmax(1)
    return -logs.scatter(1, wrong[:, None], -torch.inf).logsumexp(1)


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared L2 distance row by row, (N, D) twice to (N,)."""
    return (wide(first) - wide(second)).square().sum(1)
