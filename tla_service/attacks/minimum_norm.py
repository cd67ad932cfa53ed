"""Smallest sparse perturbations, by foolbox's Fast Minimum Norm attack.

Source: Pintor et al. 2021, "Fast minimum-norm adversarial attacks through adaptive norm constraints".
"""

from typing import Literal

import torch
from torch import Tensor, nn

SparseNorm = Literal["l0", "l1"]


def minimum_norms(logits: nn.Module, images: Tensor, labels: Tensor, norm: SparseNorm, *, steps: int = 100) -> Tensor:
    """Sizes (N,) of the smallest perturbations found that change the images' classes to wrong ones: upper bounds.

    0 where an image is misclassified already, infinity where none was found. Images are (N, C, H, W), float32 in
    [0, 1]; the module gives logits (N, K), is in eval mode, and its parameters want no gradients. ``l0`` counts changed
    values (a colour pixel has three), ``l1`` sums absolute changes.
    """
    from foolbox import PyTorchModel
    from foolbox.attacks import L0FMNAttack, L1FMNAttack

    with torch.no_grad():
        wrong = logits(images).argmax(1) != labels
    model = PyTorchModel(logits, bounds=(0, 1), device=images.device)
    attack = (L0FMNAttack if norm == "l0" else L1FMNAttack)(steps=steps)
    _, adversarial, broken = attack(model, images, labels, epsilons=None)
    with torch.no_grad():
        changed = (adversarial - images).flatten(1)
        sizes = (changed != 0).sum(1).float() if norm == "l0" else changed.abs().sum(1)
        # Checked here rather than trusted: the returned image must be misclassified.
        broken = logits(adversarial).argmax(1) != labels
    sizes = torch.where(broken, sizes, torch.inf)
    return torch.where(wrong, 0.0, sizes)
