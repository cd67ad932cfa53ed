"""Shortcuts give what they take the place of: the package's own code, and loops over single images."""

from functools import partial
from typing import Any

import pytest
import torch
from pyautoattack.fab_projections import projection_linf
from pyautoattack.square import SquareAttack
from torch import Tensor

from tla_service.attacks import Attack, climb, starting_point
from tla_service.attacks.gradient import climb_until_repeated
from tla_service.attacks.shortcuts import project_linf, search_squares
from tla_service.models import build_model
from tla_service.runtime import generator


class Counting:
    """The logits of a small CNN, and how many images it was asked for."""

    def __init__(self, channels: int = 1) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = build_model("digits_cnn", 4, (channels, 8, 8)).eval().requires_grad_(requires_grad=False)
        self.rows = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.rows += len(images)
        logits: Tensor = self.network(images).logits
        return logits


def pictures(count: int) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return images, Counting()(images).argmax(1)


@pytest.mark.parametrize(("channels", "epsilon"), [(1, 0.02), (1, 0.8), (3, 0.02)])
def test_square_finds_the_same_images_with_fewer_forward_passes(channels: int, epsilon: float) -> None:
    images = torch.rand(12, channels, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = Counting(channels)(images).argmax(1)
    found, rows = [], []
    for is_shortened in (False, True):
        logits_fn = Counting(channels)
        square = SquareAttack(logits_fn, eps=epsilon, n_queries=400, seed=0, device="cpu", resc_schedule=False)
        if is_shortened:
            square.attack_single_run = partial(search_squares, square)
        found.append(square.perturb(images.clone(), labels))
        rows.append(logits_fn.rows)
    assert torch.equal(*found)
    broken = Counting(channels)(found[0]).argmax(1) != labels
    assert broken.any() == (epsilon > 0.5), broken
    assert rows[1] < (0.7 if channels == 1 else 1) * rows[0], rows


@pytest.mark.parametrize("distance", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("size", [5, 64])
def test_the_projection_is_the_packages_and_the_shortest_by_bisection(size: int, distance: float) -> None:
    draws = torch.Generator().manual_seed(size)
    points, normals = torch.rand(40, size, generator=draws), torch.randn(40, size, generator=draws)
    points[torch.rand(points.shape, generator=draws) < 0.3] = 0
    normals[torch.rand(normals.shape, generator=draws) < 0.2] = 0
    normals[0] = 0
    offsets = (normals * points).sum(1) + distance * torch.randn(40, generator=draws)
    steps = project_linf(points, normals, offsets)
    torch.testing.assert_close(steps, projection_linf(points, normals, offsets), rtol=0, atol=2e-6)
    assert ((points + steps >= -1e-6) & (points + steps <= 1 + 1e-6)).all()
    for point, normal, offset, step in zip(points.double(), normals.double(), offsets.double(), steps, strict=True):
        towards = -normal.sign() * (normal @ point - offset).sign()
        missing = abs(normal @ point - offset)

        def covered(length: float, point: Tensor = point, normal: Tensor = normal, towards: Tensor = towards) -> float:
            return float((normal @ ((point + length * towards).clamp(0, 1) - point)).abs())

        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if covered(middle) < missing else (low, middle)
        expected = high if covered(1.0) >= missing else None
        if expected is not None and missing > 0:
            assert float(step.abs().max()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["pgd", "bim", "cw", "mim"])
@pytest.mark.parametrize("num_steps", [39, 40])
def test_steps_that_repeat_are_left_out_and_change_nothing(kind: str, num_steps: int) -> None:
    images, labels = pictures(16)
    attack = Attack(kind=kind, epsilon=0.1, step_size=0.05, num_steps=num_steps)
    start = starting_point(images, attack, generator(images.device, 0))
    every, fewer = Counting(), Counting()
    expected = climb(every, images, start, labels, attack)
    assert torch.equal(climb_until_repeated(fewer, images, start, labels, attack), expected)
    assert (fewer.rows < 0.9 * every.rows) == (kind != "mim"), (fewer.rows, every.rows)


def test_other_norms_take_every_step() -> None:
    images, labels = pictures(4)
    logits_fn: Any = Counting()
    climb_until_repeated(logits_fn, images, images, labels, Attack(norm="l2", epsilon=1, step_size=0.1, num_steps=5))
    assert logits_fn.rows == 20
