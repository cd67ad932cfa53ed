"""The robustness suite: each image's fate under each attack, one shard of the test set at a time."""

from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, Attack, LogitsFn, attack_images
from tla_service.attacks.autoattack import VERSION, AutoAttackNorm, run_autoattack
from tla_service.errors import ConfigError
from tla_service.evaluation.mode import as_pixels, evaluating, float32, logits_of
from tla_service.evaluation.outcomes import AutoAttackRun, ShardOutcome
from tla_service.runtime import generator


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
    _check(images, labels, attacks, transfer, surrogate)
    numbers = np.arange(len(labels), dtype=np.int64) if indices is None else np.asarray(indices, dtype=np.int64)
    names = ["clean", *attacks, *transfer, *(["autoattack"] if autoattack else [])]
    left_out: dict[str, str] = {}
    warnings: list[str] = []
    run: AutoAttackRun | None = None
    broken_at = {name: np.full(len(labels), UNBROKEN, dtype=np.int64) for name in names}
    with evaluating(network, surrogate), float32(device):
        logits_fn = logits_of(network)
        source_fn = logits_fn if surrogate is None else logits_of(surrogate)
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            pixels, truth = as_pixels(images[part], device), labels[part].to(device)
            wrong = clean_logits(logits_fn, pixels, truth).argmax(1) != truth
            broken_at["clean"][part] = torch.where(wrong, 0, UNBROKEN).cpu().numpy()
            for name, attack in (*attacks.items(), *transfer.items()):
                random = generator(device, seed, crc32(name.encode()), int(numbers[start]))
                crafted_on = source_fn if name in transfer else logits_fn
                attacked = attack_images(logits_fn, pixels, truth, attack, random, crafted_on)
                broken_at[name][part] = attacked.broken_at.cpu().numpy()
            if autoattack:
                norm, epsilon = autoattack
                result = run_autoattack(
                    logits_fn, pixels, truth, norm=norm, epsilon=epsilon, seed=seed, batch_size=batch_size
                )
                broken_at["autoattack"][part] = result.broken_at.cpu().numpy()
                left_out |= result.left_out
                run = AutoAttackRun(VERSION, norm, epsilon, result.stages)
                warnings += result.warnings
    truths, said = labels.cpu().numpy().astype(np.int64), tuple(dict.fromkeys(warnings))
    return ShardOutcome(numbers, truths, broken_at, left_out, run, warnings=said)


def clean_logits(logits_fn: LogitsFn, images: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, K) of clean images, checked.

    Raises:
        ConfigError: The network cannot take the images, has too few classes, or gives logits that are not finite.
    """
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


def _check(
    images: Tensor, labels: Tensor, attacks: Mapping[str, Attack], transfer: Mapping[str, Attack], surrogate: object
) -> None:
    if len(images) != len(labels) or not len(labels):
        raise ConfigError(
            "images", len(images), f"there are {len(labels)} labels", "give a label per image, and one at least"
        )
    for name, attack in {**attacks, **transfer}.items():
        if not attack.epsilon > 0:
            raise ConfigError(
                f"{name}.epsilon", attack.epsilon, "leaves nothing to attack with", "give a radius above 0"
            )
    if transfer and surrogate is None:
        name = next(iter(transfer))
        raise ConfigError(
            name, None, "transfers from a surrogate and there is none", "give one, or leave the attack out"
        )
    taken = {"clean", "autoattack"} & {*attacks, *transfer} or set(attacks) & set(transfer)
    if taken:
        raise ConfigError("attacks", min(taken), "this name is taken", "call the attack otherwise")
