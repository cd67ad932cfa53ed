"""Clean and robust accuracy, over all workers' shards."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from tla_service.attacks import Attack, attack_images
from tla_service.config.adversary import AttackConfig, EvaluationAttack
from tla_service.config.radii import no_radius
from tla_service.data import Batch
from tla_service.errors import ConfigError
from tla_service.evaluation.shards import evaluating, float32, logits_of
from tla_service.runtime import WorkerContext, all_reduce_sum, generator


def evaluation_attack(attack: EvaluationAttack, training: AttackConfig, data_name: str, field: str) -> Attack:
    """An attack of the evaluation; radius and step size, where left open, are the training attack's in the same norm.

    In another norm the data set's documented radius counts; ConfigError, naming `field`, if there is none.
    """
    norm, epsilon, step_size = attack.lengths(training, data_name)
    if epsilon is None or step_size is None:
        raise ConfigError(f"{field}.norm", norm, *no_radius(data_name, norm, f"{field}.epsilon"))
    return Attack(
        kind=attack.kind,
        norm=norm,
        epsilon=epsilon,
        step_size=step_size,
        num_steps=attack.num_steps,
        num_restarts=attack.num_restarts,
    )


def measure_accuracy(
    network: nn.Module,
    batches: Iterable[Batch],
    attacks: Mapping[str, Attack],
    context: WorkerContext,
    seed: int,
) -> dict[str, float]:
    """Accuracy on clean images and under each attack; the network is in eval mode and float32 throughout.

    Args:
        network: The bare network; its mode is restored afterwards.
        batches: This worker's shard of the images.
        attacks: Adversaries by name.
        context: This worker; counts are summed over all of them.
        seed: Fixes the random starts.

    Returns:
        Shares in [0, 1]: `clean_accuracy`, `robust_accuracy/NAME` by attack, and `robust_accuracy` under all of them.
    """
    counts = torch.zeros(len(attacks) + 3, dtype=torch.float64, device=context.device)
    with evaluating(network), float32(context.device):
        for index, batch in enumerate(batches):
            counts += _count(network, batch, attacks, generator(context.device, seed, context.rank, index))
    total, clean, unbroken, *robust = all_reduce_sum(counts, context).tolist()
    named = {f"robust_accuracy/{name}": count / total for name, count in zip(attacks, robust, strict=True)}
    return {"clean_accuracy": clean / total, "robust_accuracy": unbroken / total, **named}


def _count(network: nn.Module, batch: Batch, attacks: Mapping[str, Attack], random: torch.Generator) -> torch.Tensor:
    """Images, images right when clean, images right under every attack, then under each attack."""
    logits_fn = logits_of(network)
    with torch.no_grad():
        clean = logits_fn(batch.images).argmax(1) == batch.labels
    survived = clean.clone()
    robust = []
    for attack in attacks.values():
        standing = attack_images(logits_fn, batch.images, batch.labels, attack, random).robust
        survived &= standing
        robust.append(standing.sum())
    total = torch.tensor(len(batch.labels), device=clean.device)
    return torch.stack([total, clean.sum(), survived.sum(), *robust]).double()
