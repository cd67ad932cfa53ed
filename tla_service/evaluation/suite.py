"""Attacks on one shard of images at a time: per-image results, smallest perturbations, accuracy over all workers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, Attack, LogitsFn, attack_images, is_right
from tla_service.attacks.autoattack import VERSION, run_autoattack
from tla_service.attacks.minimum_norm import SparseNorm, minimum_norms
from tla_service.config.adversary import AttackConfig, EvaluationAttack
from tla_service.config.radii import Norm, no_radius
from tla_service.data import Batch
from tla_service.errors import ConfigError, one_line
from tla_service.evaluation import shards as sh
from tla_service.evaluation.evidence import adversarial_arrays
from tla_service.evaluation.results import Curve, MinimumNorms, share_of
from tla_service.evaluation.shards import Shard, evaluating, float32, logits_of
from tla_service.models import LogitsOnly
from tla_service.models.own_code import load_function
from tla_service.runtime import WorkerContext, all_reduce_sum, generator

SPARSE_NORMS: tuple[SparseNorm, ...] = ("l0", "l1")
_MOST_POINTS = 40  # of a curve


@dataclass(frozen=True)
class AttackMeasurement:
    """Per-image results of attacks, in float32 whatever the process's settings; merged to a ShardOutcome.

    An attack's random starts depend on the seed, its name and the number of the first image of the batch: not on the
    other attacks, nor on which worker runs the shard. Transfer attacks are crafted on the surrogate and scored on the
    network (black box); `autoattack` is norm and radius, None: not run. `keep_images` keeps AutoAttack's images.
    """

    attacks: Mapping[str, Attack]
    transfer: Mapping[str, Attack]
    autoattack: tuple[Norm, float] | None
    seed: int
    batch_size: int
    keep_images: bool = False

    def run(self, shard: Shard) -> sh.Arrays:
        """Attack the images; ConfigError if the network does not fit them."""
        device, seed, size = shard.device, self.seed, self.batch_size
        left_out: dict[str, str] = {}
        warnings: list[str] = []
        run: sh.AutoAttackRun | None = None
        broken_at: list[sh.Arrays] = []
        per_image: list[sh.Arrays] = []
        with evaluating(shard.network, shard.surrogate), float32(device):
            logits_fn = logits_of(shard.network)
            few = sh.as_pixels(shard.images[:size], device)
            own_fn = logits_of(sh.frozen(shard.network, few))
            source_fn = own_fn if shard.surrogate is None else logits_of(sh.frozen(shard.surrogate, few))
            for first, batch in zip(shard.rows[::size].tolist(), shard.batches(size), strict=True):
                pixels, truth = batch.images, batch.labels
                predicted = clean_logits(logits_fn, pixels, truth).argmax(1)
                per_image.append({"predicted": predicted.cpu().numpy()})
                broken = {"clean": torch.where(predicted != truth, 0, UNBROKEN)}
                for name, attack in (*self.attacks.items(), *self.transfer.items()):
                    random = generator(device, seed, crc32(name.encode()), first)
                    crafted_on = source_fn if name in self.transfer else own_fn
                    broken[name] = attack_images(logits_fn, pixels, truth, attack, random, crafted_on).broken_at
                if self.autoattack:
                    norm, epsilon = self.autoattack
                    result = run_autoattack(
                        logits_fn,
                        pixels,
                        truth,
                        norm=norm,
                        epsilon=epsilon,
                        seed=seed,
                        batch_size=size,
                        crafted_on=own_fn,
                    )
                    broken["autoattack"] = result.broken_at
                    left_out |= result.left_out
                    run = sh.AutoAttackRun(VERSION, norm, epsilon, result.stages)
                    warnings += result.warnings
                    if self.keep_images:
                        per_image[-1] |= adversarial_arrays(shard.network, pixels, result.adversarial, norm, epsilon)
                broken_at.append({name: values.cpu().numpy() for name, values in broken.items()})
        found = sh.ShardOutcome(shard.rows, shard.labels.cpu().numpy(), sh.joined_arrays(broken_at), left_out, run)
        said = tuple(dict.fromkeys(warnings))
        return sh.outcome_arrays(replace(found, warnings=said, per_image=sh.joined_arrays(per_image)))

    def merge(self, parts: Sequence[sh.Arrays]) -> sh.ShardOutcome:
        """See `Measurement`."""
        return sh.merge_outcomes([sh.outcome_from(part) for part in parts])


@dataclass(frozen=True)
class NormMeasurement:
    """The smallest perturbation found for each image; merged to norms (N,): 0 if misclassified, else infinite."""

    norm: SparseNorm
    batch_size: int

    def run(self, shard: Shard) -> sh.Arrays:
        """See `Measurement`."""
        with evaluating(shard.network), float32(shard.device):
            found = [
                minimum_norms(LogitsOnly(shard.network).eval(), batch.images, batch.labels, self.norm)
                for batch in shard.batches(self.batch_size)
            ]
        return {"norms": torch.cat(found).cpu().numpy()}

    def merge(self, parts: Sequence[sh.Arrays]) -> npt.NDArray[np.float64]:
        """See `Measurement`."""
        return np.concatenate([part["norms"] for part in parts]).astype(np.float64)


def minimum_norms_of(norms: npt.NDArray[np.float64], norm: SparseNorm) -> MinimumNorms:
    """Summarise the smallest perturbation found for each image (N,): 0 if misclassified, infinite if none."""
    finite = norms[np.isfinite(norms) & (norms > 0)]
    sizes = np.unique(finite) if len(finite) else np.array([1.0])
    if len(sizes) > _MOST_POINTS:
        sizes = np.unique(np.quantile(finite, np.linspace(0, 1, _MOST_POINTS), method="higher"))
    x = (0.0, *(float(size) for size in sizes))
    curve = Curve("FMN", norm, x, tuple(share_of(norms > size) for size in x))
    median = float(np.quantile(norms, 0.5, method="higher")) if len(norms) else math.inf
    return MinimumNorms(norm, len(norms), int((norms == 0).sum()), median if math.isfinite(median) else None, curve)


def evaluation_attack(
    attack: EvaluationAttack, training: AttackConfig, data_name: str, field: str, code: bytes | None = None
) -> Attack:
    """An attack of the evaluation; radius and step size, where left open, are the training attack's in the same norm.

    In another norm the data set's documented radius counts; ConfigError, naming `field`, if there is none. `code` is
    what `load_function` takes.
    """
    norm, epsilon, step_size = attack.lengths(training, data_name)
    if epsilon is None or step_size is None:
        raise ConfigError(f"{field}.norm", norm, *no_radius(data_name, norm, f"{field}.epsilon"))
    own = load_function(f"{field}.kind", attack.kind, code) if ":" in attack.kind else None
    return Attack(attack.kind, norm, epsilon, step_size, attack.num_steps, attack.num_restarts, function=own)


def measure_accuracy(
    network: nn.Module, batches: Iterable[Batch], attacks: Mapping[str, Attack], context: WorkerContext, seed: int
) -> dict[str, float]:
    """Accuracy on clean images and under each attack, of a bare network in eval mode and float32.

    `batches` are this worker's shard of the images; counts are summed over all workers. The seed fixes the random
    starts. Returns shares in [0, 1]: `clean_accuracy`, `robust_accuracy/NAME` by attack, and `robust_accuracy` under
    all of them.
    """
    return accuracies(all_reduce_sum(count_right(network, batches, attacks, context, seed), context), attacks)


def count_right(
    network: nn.Module, batches: Iterable[Batch], attacks: Mapping[str, Attack], context: WorkerContext, seed: int
) -> Tensor:
    """This worker's counts (3 + attacks,), float64, to be summed over all workers for `accuracies`."""
    counts = torch.zeros(len(attacks) + 3, dtype=torch.float64, device=context.device)
    logits_fn = logits_of(network)
    with evaluating(network), float32(context.device):
        for index, batch in enumerate(batches):
            images, labels = batch.images, batch.labels
            random = generator(context.device, seed, context.rank, index)
            with torch.no_grad():
                clean = is_right(logits_fn(images), labels)
            robust = [attack_images(logits_fn, images, labels, each, random).robust for each in attacks.values()]
            unbroken = torch.stack([clean, *robust]).all(0)
            counts += torch.stack([torch.ones_like(clean), clean, unbroken, *robust]).sum(1)
    return counts


def accuracies(counts: Tensor, attacks: Iterable[str]) -> dict[str, float]:
    """What `measure_accuracy` returns, from the counts of all workers."""
    total, clean, unbroken, *robust = counts.tolist()
    named = {f"robust_accuracy/{name}": count / total for name, count in zip(attacks, robust, strict=True)}
    return {"clean_accuracy": clean / total, "robust_accuracy": unbroken / total, **named}


def clean_logits(logits_fn: LogitsFn, images: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, K) of clean images; ConfigError if the network does not fit the images or their classes."""
    shape = "x".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad():
            logits = logits_fn(images)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"cannot take {shape} images ({one_line(error) or type(error).__name__})"
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
