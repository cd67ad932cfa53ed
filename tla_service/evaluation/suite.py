"""The robustness suite: each image's fate under each attack, one shard of the test set at a time.

A shard's outcome is plain arrays: shards are merged, kept for a rerun, and compared between models image by image.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tla_service.attacks import Attack, LogitsFn, attack_images, craft
from tla_service.attacks.autoattack import AutoAttackNorm, AutoAttackResult, run_autoattack
from tla_service.errors import ConfigError
from tla_service.evaluation.intervals import BoolArray, Interval, PairedDifference, paired_difference, wilson_interval
from tla_service.runtime import generator

IntArray = npt.NDArray[np.int64]
STANDS = -1


@dataclass(frozen=True)
class ShardOutcome:
    """The fate of some images.

    Attributes:
        indices: Number of each image in its test set (N,).
        labels: True classes (N,).
        broken_at: By attack, (N,): 0 where the network is wrong before any attack, r where the r-th restart (or the
            r-th stage of AutoAttack) broke the image, STANDS where none did. ``clean`` is among the attacks.
    """

    indices: IntArray
    labels: IntArray
    broken_at: dict[str, IntArray]

    def standing(self, attack: str, restarts: int | None = None) -> BoolArray:
        """Whether each image is still classified right (N,).

        Args:
            attack: Its name; ``clean`` for no attack.
            restarts: Count only this many of its restarts; None: all.

        Raises:
            ConfigError: The attack was not run.
        """
        if attack not in self.broken_at:
            raise ConfigError("attack", attack, "was not run", f"choose from {', '.join(self.broken_at)}")
        broken_at = self.broken_at[attack]
        standing: BoolArray = broken_at == STANDS if restarts is None else (broken_at == STANDS) | (broken_at > restarts)
        return standing


class AttackAccuracy(NamedTuple):
    """Accuracy under one attack.

    Attributes:
        overall: Over all images.
        per_class: By class; a class without images has the estimate NaN.
    """

    overall: Interval
    per_class: tuple[Interval, ...]


def evaluate_shard(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Attack],
    *,
    indices: Sequence[int] | None = None,
    transfer: Mapping[str, Attack] | None = None,
    surrogate: nn.Module | None = None,
    autoattack: tuple[AutoAttackNorm, float] | None = None,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> ShardOutcome:
    """Attack some images, in float32 whatever the process's settings.

    An attack's random starts depend on the seed, its name and the number of the first image of the batch: not on the
    other attacks, nor on which worker runs the shard.

    Args:
        network: The bare network, on the device; gives ``.logits``. Its mode is restored.
        images: (N, C, H, W), uint8 in [0, 255] or float in [0, 1], anywhere.
        labels: True classes (N,), int64.
        attacks: White-box attacks by name.
        indices: Number of each image in its test set; None: 0 to N - 1.
        transfer: Attacks that are made on the surrogate and scored on the network (black box).
        surrogate: An independently trained network for them.
        autoattack: Norm and radius of AutoAttack, run as ``autoattack``; None: not run.
        seed: Fixes every draw.
        batch_size: Images a forward pass.
        device: Where the network is.

    Raises:
        ConfigError: The network cannot take the images, has too few classes or gives logits that are not finite; an
            attack's radius is not above 0; or attacks are to be transferred without a surrogate.
    """
    transfer = transfer or {}
    _check(labels, images, attacks, transfer, surrogate)
    numbers = np.arange(len(labels), dtype=np.int64) if indices is None else np.asarray(indices, dtype=np.int64)
    names = ["clean", *attacks, *transfer, *(["autoattack"] if autoattack else [])]
    broken_at = {name: np.full(len(labels), STANDS, dtype=np.int64) for name in names}
    with _evaluating(network), _evaluating(surrogate), float32(device):
        logits_fn = logits_of(network)
        source_fn = logits_fn if surrogate is None else logits_of(surrogate)
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            pixels, truth = as_pixels(images[part], device), labels[part].to(device)
            wrong = ~check_logits(logits_fn, pixels, truth)
            broken_at["clean"][part] = torch.where(wrong, 0, STANDS).cpu().numpy()
            for name, attack in (*attacks.items(), *transfer.items()):
                random = generator(device, seed, crc32(name.encode()), int(numbers[start]))
                crafted_on = source_fn if name in transfer else logits_fn
                fates = restart_fates(logits_fn, pixels, truth, attack, random, crafted_on)
                broken_at[name][part] = fates.cpu().numpy()
            if autoattack:
                norm, epsilon = autoattack
                result = run_autoattack(
                    logits_fn, pixels, truth, norm=norm, epsilon=epsilon, seed=seed, batch_size=batch_size
                )
                broken_at["autoattack"][part] = _stage_fates(result)
    return ShardOutcome(numbers, labels.cpu().numpy().astype(np.int64), broken_at)


def restart_fates(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    random: torch.Generator | None = None,
    crafted_on: LogitsFn | None = None,
) -> Tensor:
    """Which restart breaks each image first.

    Args:
        logits_fn: The network under attack.
        images: (N, C, H, W), float32 in [0, 1].
        labels: (N,), int64.
        attack: The adversary, with its restarts.
        random: Source of the random starts.
        crafted_on: The network whose gradients are followed; None: the one under attack.

    Returns:
        (N,), int64: 0 for wrong before the attack, then the number of the restart, STANDS for none. Images standing
        after all restarts are those of :func:`tla_service.attacks.attack_images` with the same generator.
    """
    crafted_on = crafted_on or logits_fn
    with torch.no_grad():
        fates = torch.where(logits_fn(images).argmax(1) == labels, STANDS, 0)
    for restart in range(1, (attack.num_restarts if attack.starts_at_random else 1) + 1):
        left = (fates == STANDS).nonzero().squeeze(1)
        if len(left) == 0:
            break
        adversarial = craft(crafted_on, images[left], labels[left], attack, random)
        with torch.no_grad():
            fates[left[logits_fn(adversarial).argmax(1) != labels[left]]] = restart
    return fates
