"""Is the robustness real? Checks for gradient masking, each with its figure, threshold and meaning."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from tla_service.attacks import UNBROKEN, Attack
from tla_service.evaluation import audit_checks as checks
from tla_service.evaluation.mode import as_pixels, evaluating, float32, logits_of
from tla_service.evaluation.outcomes import Arrays
from tla_service.evaluation.results import Audit, Check
from tla_service.evaluation.shards import Shard
from tla_service.evaluation.suite import clean_logits


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
            subject = checks.Subject(logits_of(shard.network), pixels, labels, self.seed, self.batch_size)
            for x, y in subject.batches():
                clean_logits(subject.logits_fn, x, y)
            standing = subject.broken_at(one) == UNBROKEN
            iterative = checks.mean_of(standing)
            results = [
                checks.single_step(subject, one, iterative),
                checks.transfer(subject, one, iterative, shard.surrogate or self.no_surrogate),
                checks.square(subject, one, standing, self.square_queries),
                checks.far(subject, one),
                *checks.steps(subject, one, iterative),
                checks.gradients(subject),
                checks.restarts(subject, one),
                checks.margin(subject, one, iterative),
                checks.bfloat16(subject, one),
            ]
        return {"audit": np.array(json.dumps(asdict(Audit.of(results, len(shard.labels)))))}

    def merge(self, parts: Sequence[Arrays]) -> Audit:
        """See `Measurement`."""
        (only,) = parts
        found = json.loads(str(only["audit"]))
        return Audit.of([Check(**check) for check in found["checks"]], found["images"])
