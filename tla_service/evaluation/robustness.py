"""Clean and robust accuracy, over all workers' shards."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from tla_service.attacks import Attack, attack_images
from tla_service.config.adversary import AttackConfig, EvaluationAttack
from tla_service.config.radii import no_radius
from tla_service.data import Batch
from tla_service.errors import ConfigError
from tla_service.evaluation.mode import evaluating, float32
from tla_service.runtime import WorkerContext, all_reduce_sum, generator


def evaluation_attack(attack: EvaluationAttack, training: AttackConfig, data_name: str, field: str) -> Attack:
    """An attack of the evaluation, with what it leaves open taken from the training attack.

    Args:
        attack: As configured.
        training: Where radius and step size come from in the same norm.
        data_name: Data set whose documented radius counts in another norm.
        field: Setting that named the attack, for messages.

    Raises:
        ConfigError: It has another norm and no radius, and none is documented.
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
        `clean_accuracy`, `robust_accuracy/NAME` for each attack and `robust_accuracy`, the share of images that no
        attack breaks; fractions in [0, 1].
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

    def logits_fn(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(images).logits
        return logits

    with torch.no_grad():
        clean = logits_fn(batch.images).argmax(1) == batch.labels
    survived = clean.clone()
    robust = []
    for attack in attacks.values():
        _, standing = attack_images(logits_fn, batch.images, batch.labels, attack, random)
        survived &= standing
        robust.append(standing.sum())
    total = torch.tensor(len(batch.labels), device=clean.device)
    return torch.stack([total, clean.sum(), survived.sum(), *robust]).double()
