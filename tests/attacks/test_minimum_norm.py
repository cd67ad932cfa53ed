"""Smallest sparse perturbations: on a linear network the true ones are known."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tla_service.attacks.minimum_norm import minimum_norms

# foolbox imports scipy under a name that scipy has moved.
pytestmark = pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")

WEIGHTS = torch.tensor([1.0, -0.5, 0.25, 0.1, -0.05, 0.02])


class Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function
        self.eval()


@Module
def two_classes(images: Tensor) -> Tensor:
    """Class 1 where w . x > 0.3."""
    score = images.flatten(1) @ WEIGHTS - 0.3
    return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    images = torch.rand(40, 1, 2, 3, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2
    return images, two_classes(images).argmax(1)


def fewest_changes(image: np.ndarray, label: int) -> float:
    """Turn the values that help most to the end of [0, 1], one after another, until the class changes."""
    score = float(image @ WEIGHTS.numpy() - 0.3)
    direction = -1.0 if label == 1 else 1.0
    weights = WEIGHTS.numpy() * direction
    gains = np.where(weights > 0, weights * (1 - image), -weights * image)
    reached = score * direction + np.cumsum(np.sort(gains)[::-1])
    return float(np.argmax(reached > 0) + 1) if (reached > 0).any() else float("inf")


def test_l0_is_never_below_the_true_minimum_and_comes_near_it(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    found = minimum_norms(two_classes, images, labels, "l0", steps=200).numpy()
    true = np.array([fewest_changes(image.flatten().numpy(), int(label)) for image, label in zip(*batch, strict=True)])
    assert (found >= true).all()
    assert (found == true).mean() > 0.8
    # The library's projection keeps at least two values, so that it cannot find a single one by itself.
    assert (true == 1).sum() > 10
    assert (found[true == 1] == 1).mean() > 0.9


def test_l1_is_close_to_the_true_minimum(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    found = minimum_norms(two_classes, images, labels, "l1", steps=400).numpy()
    # Without the box the smallest change is all in the largest weight; the box can only make it larger.
    least = (two_classes(images)[:, 1].abs() / WEIGHTS.abs().max()).numpy()
    assert (found >= least - 1e-4).all()
    assert np.median(found / np.maximum(least, 1e-3)) < 1.5


def test_an_image_that_is_wrong_needs_no_change(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    assert (minimum_norms(two_classes, images, 1 - labels, "l1", steps=10) == 0).all()


def test_a_network_that_nothing_moves_has_no_minimum(batch: tuple[Tensor, Tensor]) -> None:
    images, _ = batch

    @Module
    def constant(pictures: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]) + 0 * pictures.flatten(1).sum(1, keepdim=True)

    found = minimum_norms(constant, images, torch.zeros(len(images), dtype=torch.int64), "l1", steps=5)
    assert torch.isinf(found).all()
