"""Restarts keep the worst of each image."""

import pytest
import torch
from torch import Tensor

from tests.attacks import oracle
from tla_service.attacks import Attack, attack_images, craft

RESTARTS = Attack(kind="pgd", epsilon=0.2, step_size=0.01, num_steps=1, num_restarts=6)


def patchy(threshold: float) -> oracle.LogitsFn:
    """Flat everywhere, so that only the random start counts, and wrong on a small part of each image's ball."""

    def logits(images: Tensor) -> Tensor:
        score = (images.detach() * 40).sin().flatten(1).mean(1) + 0 * images.flatten(1).sum(1)
        return torch.stack([threshold - score, score - threshold], 1)

    return logits


def batch(logits_fn: oracle.LogitsFn, count: int = 60) -> tuple[Tensor, Tensor]:
    """Images that are all of class 0 and, clean, all classified so."""
    images = torch.rand(400, 1, 1, 2, dtype=torch.float64) * 0.6 + 0.2
    images = images[logits_fn(images).argmax(1) == 0][:count]
    assert len(images) == count
    return images, torch.zeros(count, dtype=torch.int64)


def each_restart(
    logits_fn: oracle.LogitsFn, images: Tensor, labels: Tensor, attack: Attack, seed: int
) -> list[dict[int, Tensor]]:
    """Every restart by itself, on the images that still stand: image number to its adversarial."""
    random = torch.Generator().manual_seed(seed)
    standing = [i for i in range(len(labels)) if int(logits_fn(images[i : i + 1]).argmax()) == labels[i]]
    tried = []
    for _ in range(attack.num_restarts):
        results = craft(logits_fn, images[standing], labels[standing], attack, random) if standing else images[:0]
        tried.append(dict(zip(standing, results, strict=True)))
        standing = [i for i, result in tried[-1].items() if int(logits_fn(result[None]).argmax()) == labels[i]]
    return tried


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_worst_of_separate_restarts_is_kept(threshold: float) -> None:
    logits_fn = patchy(threshold)
    images, labels = batch(logits_fn)
    tried = each_restart(logits_fn, images, labels, RESTARTS, seed=1)
    attacked = attack_images(logits_fn, images, labels, RESTARTS, torch.Generator().manual_seed(1))
    worst, robust = attacked.images, attacked.robust
    kept_from = []
    for i in range(len(images)):
        results = [restart[i] for restart in tried if i in restart]
        losses = [float(oracle.cross_entropy(logits_fn(result[None])[0], 0, 0.0)) for result in results]
        broken = [int(logits_fn(result[None]).argmax()) != 0 for result in results]
        kept = broken.index(True) if any(broken) else losses.index(max(losses))
        kept_from.append((any(broken), kept))
        assert robust[i].item() == (not any(broken))
        assert torch.equal(worst[i], results[kept])
    if threshold == 0.8:
        # Different restarts break different images, and the last is not the worst of all that stand.
        assert len({kept for broken, kept in kept_from if broken}) >= 3
        assert len({kept for broken, kept in kept_from if not broken}) >= 3


def test_last_restart_does_not_undo_an_earlier_one() -> None:
    """Broken by one restart of many: keeping the last result would call the image robust."""
    logits_fn = patchy(0.95)
    images, labels = batch(logits_fn, 200)
    attack = Attack(kind="pgd", epsilon=0.2, step_size=0.01, num_steps=1, num_restarts=20)
    tried = each_restart(logits_fn, images, labels, attack, seed=2)
    attacked = attack_images(logits_fn, images, labels, attack, torch.Generator().manual_seed(2))
    worst, robust = attacked.images, attacked.robust
    broken_early = [i for i in range(200) if i not in tried[-1]]
    assert len(broken_early) > 20
    assert not robust[broken_early].any()
    assert (logits_fn(worst[broken_early]).argmax(1) == 1).all()


def test_more_restarts_never_raise_accuracy() -> None:
    logits_fn = patchy(0.85)
    images, labels = batch(logits_fn, 120)
    before = torch.ones(120, dtype=torch.bool)
    accuracies = []
    for restarts in range(1, 9):
        attack = Attack(kind="pgd", epsilon=0.2, step_size=0.01, num_steps=1, num_restarts=restarts)
        robust = attack_images(logits_fn, images, labels, attack, torch.Generator().manual_seed(3)).robust
        assert not (robust & ~before).any()  # the first restarts draw the same starts
        before = robust
        accuracies.append(robust.double().mean().item())
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] - accuracies[-1] > 0.1


def test_among_results_that_break_nothing_the_highest_loss_is_kept() -> None:
    logits_fn = patchy(5.0)
    images, labels = batch(logits_fn)
    tried = each_restart(logits_fn, images, labels, RESTARTS, seed=4)
    attacked = attack_images(logits_fn, images, labels, RESTARTS, torch.Generator().manual_seed(4))
    worst, robust = attacked.images, attacked.robust
    assert robust.all()
    margins = torch.stack([logits_fn(torch.stack(list(restart.values()))).diff(dim=1)[:, 0] for restart in tried])
    assert torch.equal(logits_fn(worst).diff(dim=1)[:, 0], margins.amax(0))


def test_images_misclassified_before_the_attack_are_broken_and_stay_clean() -> None:
    network, asked = oracle.recording(oracle.small_network((1, 3, 3), 3))
    images = torch.rand(30, 1, 3, 3)
    right = network(images).argmax(1)
    labels = torch.where(torch.arange(30) % 3 == 0, (right + 1) % 3, right)
    asked.clear()
    attack = Attack(epsilon=0.05, step_size=0.02, num_steps=3, num_restarts=2)
    attacked = attack_images(network, images, labels, attack)
    worst, robust = attacked.images, attacked.robust
    wrong = torch.arange(30) % 3 == 0
    assert not robust[wrong].any()
    assert torch.equal(worst[wrong], images[wrong])
    assert not torch.equal(worst[~wrong], images[~wrong])
    assert len(asked[0]) == 30
    assert max(len(batch) for batch in asked[1:]) == 20


def test_all_misclassified_leaves_nothing_to_attack() -> None:
    network, asked = oracle.recording(oracle.small_network((1, 2, 2), 3))
    images = torch.rand(6, 1, 2, 2)
    labels = (network(images).argmax(1) + 1) % 3
    asked.clear()
    attacked = attack_images(network, images, labels, RESTARTS)
    worst, robust = attacked.images, attacked.robust
    assert torch.equal(worst, images)
    assert not robust.any()
    assert len(asked) == 1


@pytest.mark.parametrize(
    "attack",
    [
        Attack(kind="fgsm", num_restarts=5),
        Attack(kind="bim", num_restarts=5, num_steps=1),
        Attack(kind="pgd", num_restarts=5, num_steps=1, random_start=False),
        Attack(kind="mim", num_restarts=5, num_steps=1, random_start=False),
    ],
    ids=lambda attack: attack.kind,
)
def test_without_a_draw_there_is_one_attempt(attack: Attack) -> None:
    network, asked = oracle.recording(oracle.small_network((1, 2, 2), 3, scale=0.1))
    images = torch.rand(6, 1, 2, 2)
    labels = network(images).argmax(1)
    asked.clear()
    attack_images(network, images, labels, attack)
    assert len(asked) == 3  # the clean images, one gradient, the verdict


def test_broken_image_is_not_attacked_again() -> None:
    logits_fn, asked = oracle.recording(patchy(0.8))
    images, labels = batch(logits_fn)
    asked.clear()
    attack_images(logits_fn, images, labels, RESTARTS, torch.Generator().manual_seed(1))
    sizes = [len(batch) for batch in asked[1::2]]
    assert sizes[0] == 60
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 60
