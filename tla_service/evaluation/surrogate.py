"""A small network trained on the spot: a surrogate for the audit when none is given, or a natural one.

The audit's is trained slightly adversarially: perturbations from such networks transfer better, to robust networks too,
than from natural ones (Springer, Mitchell and Kenyon 2021, "A little robustness goes a long way in transfer attacks").
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tla_service.attacks import Attack, craft
from tla_service.config.radii import Norm
from tla_service.data.splits import stratified_subset
from tla_service.evaluation.results import SurrogateFacts
from tla_service.evaluation.shards import Arrays, Shard, as_pixels, float32, logits_of
from tla_service.models import build_model
from tla_service.runtime import generator

ARCHITECTURE = "small_cnn"
_STEPS = 500
_BATCH = 128
_LEARNING_RATE = 0.003
_SHARE_OF_RADIUS = 0.25
_HELD_OUT = 0.1
# About what a worker can be sent at once.
_MOST_IMAGES, _MOST_BYTES = 10_000, 2**28


@dataclass(frozen=True)
class TrainedSurrogate:
    """A surrogate that was trained for the audit: its state dict, on the CPU, and how it was trained."""

    weights: dict[str, Tensor]
    facts: SurrogateFacts


def surrogate_rows(labels: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Training images for the surrogate (n,) by their labels (N,): stratified, bounded in number and in bytes."""
    channels, height, width = image_shape
    return stratified_subset(labels, min(_MOST_IMAGES, _MOST_BYTES // (channels * height * width)))


@dataclass(frozen=True)
class SurrogateMeasurement:
    """Trains a surrogate for K classes under a threat model; one shard of training images, merged to the surrogate.

    The seed fixes weights, held-out images, batches and perturbations; the process's random states are restored.
    """

    norm: Norm
    epsilon: float
    num_classes: int
    seed: int
    natural: bool = False

    def run(self, shard: Shard) -> Arrays:
        """Train it; ConfigError if the images are too small for the network."""
        began = time.monotonic()
        images, labels, device = shard.images, shard.labels, shard.device
        channels, height, width = images.shape[1:]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            network = build_model(ARCHITECTURE, self.num_classes, (channels, height, width)).to(device).train()
        radius = _SHARE_OF_RADIUS * self.epsilon
        attack = Attack(kind="pgd", norm=self.norm, epsilon=radius, step_size=1.25 * radius, num_steps=1)
        optimizer = torch.optim.Adam(network.parameters(), _LEARNING_RATE)
        draws, starts = generator(torch.device("cpu"), self.seed, 0), generator(device, self.seed, 1)
        order = torch.randperm(len(labels), generator=draws)
        held_out, rows = order.split([round(_HELD_OUT * len(order)), len(order) - round(_HELD_OUT * len(order))])
        logits_fn = logits_of(network)
        with float32(device):
            for _ in range(_STEPS):
                chosen = rows[torch.randint(len(rows), (_BATCH,), generator=draws)]
                clean, truth = as_pixels(images[chosen], device), labels[chosen].to(device)
                seen = clean if self.natural else craft(logits_fn, clean, truth, attack, starts)
                loss = F.cross_entropy(logits_fn(seen), truth)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            network.eval()
            with torch.no_grad():
                right = [
                    logits_fn(as_pixels(images[part], device)).argmax(1).cpu() == labels[part]
                    for part in held_out.split(_BATCH)
                ]
        accuracy = float(torch.cat(right).double().mean()) if right else None
        facts = SurrogateFacts(ARCHITECTURE, len(rows), _STEPS, time.monotonic() - began, accuracy, len(held_out))
        weights = {f"weights/{name}": value.detach().cpu().numpy() for name, value in network.state_dict().items()}
        return {"facts": np.array(json.dumps(asdict(facts))), **weights}

    def merge(self, parts: Sequence[Arrays]) -> TrainedSurrogate:
        """See `Measurement`."""
        (only,) = parts
        names = [name for name in only if name.startswith("weights/")]
        weights = {name.removeprefix("weights/"): torch.from_numpy(only[name]) for name in names}
        return TrainedSurrogate(weights, SurrogateFacts(**json.loads(str(only["facts"]))))
