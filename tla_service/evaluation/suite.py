"""Per-image results of attacks, one shard of the test set at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from tla_service.attacks import UNBROKEN, Attack, LogitsFn, attack_images
from tla_service.attacks.autoattack import VERSION, AutoAttackNorm, run_autoattack
from tla_service.errors import ConfigError
from tla_service.evaluation.outcomes import (
    Arrays,
    AutoAttackRun,
    ShardOutcome,
    merge_outcomes,
    outcome_arrays,
    outcome_from,
)
from tla_service.evaluation.shards import Shard, evaluating, float32, logits_of
from tla_service.runtime import generator


@dataclass(frozen=True)
class AttackMeasurement:
    """Per-image results of attacks, in float32 whatever the process's settings; merged to a ShardOutcome.

    An attack's random starts depend on the seed, its name and the number of the first image of the batch: not on the
    other attacks, nor on which worker runs the shard. Transfer attacks are crafted on the surrogate and scored on the
    network (black box); `autoattack` is norm and radius, None: not run.
    """

    attacks: Mapping[str, Attack]
    transfer: Mapping[str, Attack]
    autoattack: tuple[AutoAttackNorm, float] | None
    seed: int
    batch_size: int

    def run(self, shard: Shard) -> Arrays:
        """Attack the images; ConfigError if network, images, attacks and surrogate do not fit each other."""
        _check(shard, self.attacks, self.transfer)
        device, seed, size = shard.device, self.seed, self.batch_size
        names = ["clean", *self.attacks, *self.transfer, *(["autoattack"] if self.autoattack else [])]
        left_out: dict[str, str] = {}
        warnings: list[str] = []
        run: AutoAttackRun | None = None
        broken_at = {name: np.full(len(shard.labels), UNBROKEN, dtype=np.int64) for name in names}
        with evaluating(shard.network, shard.surrogate), float32(device):
            logits_fn = logits_of(shard.network)
            source_fn = logits_fn if shard.surrogate is None else logits_of(shard.surrogate)
            for start, batch in zip(range(0, len(shard.labels), size), shard.batches(size), strict=True):
                part, (pixels, truth) = slice(start, start + size), (batch.images, batch.labels)
                wrong = clean_logits(logits_fn, pixels, truth).argmax(1) != truth
                broken_at["clean"][part] = torch.where(wrong, 0, UNBROKEN).cpu().numpy()
                for name, attack in (*self.attacks.items(), *self.transfer.items()):
                    random = generator(device, seed, crc32(name.encode()), int(shard.rows[start]))
                    crafted_on = source_fn if name in self.transfer else logits_fn
                    attacked = attack_images(logits_fn, pixels, truth, attack, random, crafted_on)
                    broken_at[name][part] = attacked.broken_at.cpu().numpy()
                if self.autoattack:
                    norm, epsilon = self.autoattack
                    result = run_autoattack(
                        logits_fn, pixels, truth, norm=norm, epsilon=epsilon, seed=seed, batch_size=size
                    )
                    broken_at["autoattack"][part] = result.broken_at.cpu().numpy()
                    left_out |= result.left_out
                    run = AutoAttackRun(VERSION, norm, epsilon, result.stages)
                    warnings += result.warnings
        labels, said = shard.labels.cpu().numpy().astype(np.int64), tuple(dict.fromkeys(warnings))
        return outcome_arrays(ShardOutcome(shard.rows, labels, broken_at, left_out, run, warnings=said))

    def merge(self, parts: Sequence[Arrays]) -> ShardOutcome:
        """See `Measurement`."""
        return merge_outcomes([outcome_from(part) for part in parts])


def clean_logits(logits_fn: LogitsFn, images: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, K) of clean images; ConfigError if the network does not fit the images or their classes."""
    shape = "x".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad():
            logits = logits_fn(images)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"cannot take {shape} images ({str(error).splitlines()[0]})"
        raise ConfigError("model", None, reason, "evaluate it on images like those it was trained on") from error
    if logits.ndim != 2 or len(logits) != len(images):
        reason = f"gives {tuple(logits.shape)} for {len(images)} images"
        raise ConfigError("model", None, reason, "give a classifier with logits (N, K)")
    if int(labels.max()) >= logits.shape[1]:
        reason = f"knows {logits.shape[1]} classes, the images have class {int(labels.max())}"
        raise ConfigError("model", None, reason, "evaluate it on the classes it was trained on")
    if not logits.isfinite().all():
        raise ConfigError("model", None, "gives logits that are not finite on clean images", "choose other weights")
    return logits


def _check(shard: Shard, attacks: Mapping[str, Attack], transfer: Mapping[str, Attack]) -> None:
    images, labels = len(shard.images), len(shard.labels)
    if images != labels or not labels:
        raise ConfigError("images", images, f"there are {labels} labels", "give a label per image, and one at least")
    for name, attack in {**attacks, **transfer}.items():
        if not attack.epsilon > 0:
            raise ConfigError(
                f"{name}.epsilon", attack.epsilon, "leaves nothing to attack with", "give a radius above 0"
            )
    if transfer and shard.surrogate is None:
        reason = "transfers from a surrogate and there is none"
        raise ConfigError(next(iter(transfer)), None, reason, "give one, or leave the attack out")
    taken = {"clean", "autoattack"} & {*attacks, *transfer} or set(attacks) & set(transfer)
    if taken:
        raise ConfigError("attacks", min(taken), "this name is taken", "call the attack otherwise")
