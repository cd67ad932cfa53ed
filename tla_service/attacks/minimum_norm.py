"""Smallest sparse perturbations, by foolbox's Fast Minimum Norm attack.

Source: Pintor et al. 2021, "Fast minimum-norm adversarial attacks through adaptive norm constraints".
"""

from typing import Literal

import torch
from torch import Tensor, nn

from tla_service.attacks.gradient import is_right

SparseNorm = Literal["l0", "l1"]
_MOST_PRUNED = 20


def minimum_norms(logits: nn.Module, images: Tensor, labels: Tensor, norm: SparseNorm, *, steps: int = 100) -> Tensor:
    """Sizes (N,) of the smallest perturbations found that change the images' classes to wrong ones: upper bounds.

    0 where an image is misclassified already, infinity where none was found. Images are (N, C, H, W), float32 in
    [0, 1]; the module gives logits (N, K), is in eval mode, and its parameters want no gradients. ``l0`` counts changed
    values (a colour pixel has three), ``l1`` sums absolute changes.
    """
    from foolbox import PyTorchModel
    from foolbox.attacks import L0FMNAttack, L1FMNAttack

    with torch.no_grad():
        wrong = ~is_right(logits(images), labels)
    model = PyTorchModel(logits, bounds=(0, 1), device=images.device)
    attack = (L0FMNAttack if norm == "l0" else L1FMNAttack)(steps=steps)
    _, adversarial, broken = attack(model, images, labels, epsilons=None)
    if norm == "l0":
        adversarial = _pruned(logits, images, adversarial, labels)
    with torch.no_grad():
        changed = (adversarial - images).flatten(1)
        sizes = (changed != 0).sum(1).float() if norm == "l0" else changed.abs().sum(1)
        # Checked here rather than trusted: the returned image must be misclassified.
        broken = ~is_right(logits(adversarial), labels)
    sizes = torch.where(broken, sizes, torch.inf)
    return torch.where(wrong, 0.0, sizes)


@torch.no_grad()
def _pruned(logits: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """Take back the smallest changes, one after another, wherever the image stays misclassified without them.

    The library's projection keeps a value more than the norm allows, and so two at least: without this, no image would
    fall to a single value.
    """
    rows = torch.arange(len(images), device=images.device)
    pruned, clean = adversarial.flatten(1).clone(), images.flatten(1)
    changes = (pruned - clean).abs()
    order = torch.where(changes > 0, changes, torch.inf).argsort(dim=1)
    for column in order[:, :_MOST_PRUNED].T:
        tried = pruned.clone()
        tried[rows, column] = clean[rows, column]
        misclassified = ~is_right(logits(tried.view_as(images)), labels)
        pruned = torch.where(misclassified[:, None], tried, pruned)
    return pruned.view_as(images)
