"""AutoAttack on linear networks, where the distance to the decision boundary is known in closed form."""

import logging
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, LogitsFn
from tla_service.attacks.autoattack import ALL_STAGES, ZERO_GRADIENT, AutoAttackResult, run_autoattack

DUAL = {"linf": 1, "l2": 2}
RADIUS = {"linf": 0.02, "l2": 0.1}
SIDE = 6


class Linear(nn.Module):
    def __init__(self, classes: int, channels: int = 1) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(classes)
        self.weight = nn.Parameter(torch.randn(classes, channels * SIDE * SIDE, generator=draws))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


def mid_grey(count: int, channels: int = 1, side: int = SIDE) -> Tensor:
    """Images whose balls stay inside [0, 1], so that clipping plays no part."""
    return 0.5 + 0.4 * (torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1)) - 0.5)


def attack(logits_fn: LogitsFn, images: Tensor, labels: Tensor, **changes: Any) -> AutoAttackResult:
    settings: dict[str, Any] = {"norm": "linf", "epsilon": 0.02, "seed": 0, "batch_size": 16, "square_queries": 30}
    return run_autoattack(logits_fn, images, labels, **(settings | changes))


def beyond_reach(network: Linear, images: Tensor, labels: Tensor, norm: str, epsilon: float) -> list[bool]:
    """No other class can win: its logit gap exceeds epsilon times the dual norm of the difference of weights."""
    results = []
    for image, label in zip(images, labels.tolist(), strict=True):
        logits, weight = network(image[None])[0].detach(), network.weight.detach()
        results.append(
            all(
                logits[label] - logits[k] > epsilon * torch.linalg.vector_norm(weight[label] - weight[k], DUAL[norm])
                for k in range(len(logits))
                if k != label
            )
        )
    return results


@pytest.mark.parametrize(
    ("classes", "norm"),
    [(2, "linf"), (3, "linf"), (4, "linf"), (12, "linf"), (3, "l2"), (5, "l2")],
)
def test_exactly_the_images_within_reach_are_broken(classes: int, norm: Any) -> None:
    network, images = Linear(classes), mid_grey(12)
    labels = network(images).argmax(1)
    labels[0] = (labels[0] + 1) % classes
    # At the median distance to the boundary about half of the images fall.
    epsilon = RADIUS[norm] * 0.4
    result = attack(network, images, labels, norm=norm, epsilon=epsilon)
    expected = beyond_reach(network, images, labels, norm, epsilon)
    assert result.robust.tolist() == expected
    assert 0 < sum(expected) < 12
    assert result.broken_at[0] == 0
    order = {"linf": math.inf, "l2": 2}[norm]
    lengths = torch.linalg.vector_norm((result.adversarial - images).flatten(1), order, dim=1)
    assert (lengths <= epsilon * 1.0001).all()
    assert torch.equal(network(result.adversarial).argmax(1) == labels, result.robust)


def test_each_image_is_broken_by_the_first_stage_that_can() -> None:
    network, images = Linear(4), mid_grey(10)
    labels = network(images).argmax(1)
    labels[3] = (labels[3] + 1) % 4
    epsilon = RADIUS["linf"] * 0.4
    result = attack(network, images, labels, epsilon=epsilon)
    assert result.stages == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert result.left_out == {}
    expected = torch.full((10,), UNBROKEN)
    for stage in reversed(result.stages):
        alone = attack(network, images, labels, epsilon=epsilon, only=(stage,))
        assert set(alone.broken_at.tolist()) <= {UNBROKEN, 0, 1 + ALL_STAGES.index(stage)}
        expected = torch.where(alone.robust, expected, alone.broken_at)
    assert result.broken_at.tolist() == expected.tolist()
    assert {0, 1, UNBROKEN} <= set(expected.tolist())
    untouched = result.broken_at <= 0
    assert torch.equal(result.adversarial[untouched], images[untouched])


@pytest.mark.parametrize(
    ("classes", "stages"),
    [(2, ("apgd-ce", "fab-t", "square")), (3, ("apgd-ce", "apgd-dlr", "fab-t", "square"))],
)
def test_what_few_classes_leave_out_is_named(classes: int, stages: tuple[str, ...]) -> None:
    network, images = Linear(classes), mid_grey(4)
    result = attack(network, images, network(images).argmax(1), epsilon=0.001)
    assert result.stages == stages
    assert set(result.left_out) == {"apgd-t"}
    assert f"there are {classes}" in result.left_out["apgd-t"]


def test_stages_one_by_one_equal_the_whole_run_of_the_library() -> None:
    from pyautoattack import AutoAttack

    images = mid_grey(10)
    hidden = torch.randn(SIDE * SIDE, 12)
    output = torch.randn(12, 4)

    def network(pixels: Tensor) -> Tensor:
        return (3 * (pixels - 0.5).flatten(1) @ hidden).sin() @ output

    labels = network(images).argmax(1)
    library = AutoAttack(network, eps=0.01, norm="Linf", seed=3)
    library.square.n_queries = 30
    library.apgd_targeted.n_target_classes = library.fab.n_target_classes = 3
    theirs, predicted = library.run_standard_evaluation(images, labels, batch_size=6)
    ours = attack(network, images, labels, epsilon=0.01, seed=3, batch_size=6)
    assert 0 < ours.robust.sum() < 10
    assert torch.equal(ours.robust, predicted == labels)
    assert torch.equal(ours.adversarial, theirs)


def test_the_seed_decides_and_the_process_is_left_alone(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    network, images = Linear(4, channels=3), mid_grey(10, channels=3)
    labels = network(images).argmax(1)
    state, trace = torch.get_rng_state(), sys.gettrace()
    first, again, other = (attack(network, images, labels, seed=seed) for seed in (0, 0, 1))
    some = attack(network, images[:3], labels[:3], epsilon=0.004)
    assert some.robust.any(), "some images must reach every stage"
    assert torch.equal(first.adversarial, again.adversarial)
    assert not torch.equal(first.adversarial, other.adversarial)
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.gettrace() is trace
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []


def test_only_some_stages() -> None:
    network, images = Linear(4), mid_grey(6)
    result = attack(network, images, network(images).argmax(1), only=("square",))
    assert result.stages == ("square",)
    assert set(result.left_out) == {"apgd-ce", "apgd-t", "fab-t"}


def test_square_leaves_out_images_too_small_for_its_tiles() -> None:
    images = mid_grey(3, side=4)
    labels, only = torch.zeros(3, dtype=torch.int64), ("apgd-ce", "square")
    result = attack(lambda x: x.flatten(1)[:, :4] + 0, images, labels, norm="l2", only=only)
    assert result.stages == ("apgd-ce",)
    assert "5 rows" in result.left_out["square"]


def test_what_the_library_warns_of_is_kept() -> None:
    images, labels, bias = mid_grey(4), torch.zeros(4, dtype=torch.int64), torch.tensor([2.0, 0, 0, 0])
    flat = attack(lambda x: bias + 0 * x.flatten(1)[:, :4], images, labels)
    assert flat.warnings == (ZERO_GRADIENT,)
    noisy = attack(lambda x: bias + 0.1 * torch.rand(len(x), 4) + 0 * x.flatten(1)[:, :4], images, labels)
    assert any("randomized defense" in message for message in noisy.warnings)
    soft = attack(lambda x: (10 * x.flatten(1)[:, :4]).softmax(1), images, labels)
    assert any("probabilities" in message for message in soft.warnings)

    def dynamic(pixels: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = pixels.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(moved.square().sum(), moved)
        return bias + (pixels + 0 * gradient).flatten(1)[:, :4]

    assert any("dynamic defense" in message for message in attack(dynamic, images, labels).warnings)
    for classes in (2, 4):  # after a dynamic one in the same process, and with losses left out
        network = Linear(classes)
        assert attack(network, images, network(images).argmax(1)).warnings == ()


def test_images_all_wrong_before_leave_nothing_to_attack() -> None:
    network, images = Linear(3), mid_grey(5)
    result = attack(network, images, (network(images).argmax(1) + 1) % 3)
    assert result.broken_at.tolist() == [0] * 5
    assert torch.equal(result.adversarial, images)
