"""A small network trained on the spot, for the audit's transfer check when no surrogate is given.

Its training is slightly adversarial: perturbations from such networks transfer better, to robust networks too, than
from natural ones (Springer, Mitchell and Kenyon 2021, "A little robustness goes a long way in transfer attacks").
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tla_service.attacks import Attack, craft
from tla_service.config.bounds import Norm
from tla_service.data.splits import stratified_subset
from tla_service.evaluation.mode import as_pixels, float32, logits_of
from tla_service.evaluation.results import SurrogateFacts
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
    """Training images for the surrogate, stratified and bounded in number and bytes (n,).

    Args:
        labels: Class of every training image (N,).
        image_shape: (C, H, W) of each.
    """
    channels, height, width = image_shape
    return stratified_subset(labels, min(_MOST_IMAGES, _MOST_BYTES // (channels * height * width)))


def train_surrogate(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    norm: Norm,
    epsilon: float,
    *,
    seed: int,
    device: torch.device,
) -> TrainedSurrogate:
    """Train the surrogate: a fixed number of steps, each on images attacked by one step at a quarter of the radius.

    Args:
        images: Training images (N, C, H, W), uint8; a tenth is held out.
        labels: Their classes (N,), int64.
        num_classes: K.
        norm: Norm of the threat model.
        epsilon: Its radius.
        seed: Fixes every draw; global random states are restored.
        device: Where to train.

    Raises:
        ConfigError: The images are too small for the network.
    """
    began = time.monotonic()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = build_model(ARCHITECTURE, num_classes, shape).to(device).train()
    radius = _SHARE_OF_RADIUS * epsilon
    attack = Attack(kind="pgd", norm=norm, epsilon=radius, step_size=1.25 * radius, num_steps=1)
    optimizer = torch.optim.Adam(network.parameters(), _LEARNING_RATE)
    draws, starts = generator(torch.device("cpu"), seed, 0), generator(device, seed, 1)
    order = torch.randperm(len(labels), generator=draws)
    held_out, rows = order.split([round(_HELD_OUT * len(order)), len(order) - round(_HELD_OUT * len(order))])
    logits_fn = logits_of(network)
    with float32(device):
        for _ in range(_STEPS):
            chosen = rows[torch.randint(len(rows), (_BATCH,), generator=draws)]
            clean, truth = as_pixels(images[chosen], device), labels[chosen].to(device)
            loss = F.cross_entropy(logits_fn(craft(logits_fn, clean, truth, attack, starts)), truth)
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
    weights = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    seconds = time.monotonic() - began
    return TrainedSurrogate(weights, SurrogateFacts(ARCHITECTURE, len(rows), _STEPS, seconds, accuracy, len(held_out)))
