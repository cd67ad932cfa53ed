"""Every kind against a plain loop, and against what can be worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attacks import oracle
from tests.attacks.oracle import SHAPE, batch
from tla_service.attacks import Attack, craft

NORMS = ("linf", "l2")


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "attack",
    [
        Attack(kind="fgsm"),
        Attack(kind="bim", num_steps=6),
        Attack(kind="pgd", num_steps=1),
        Attack(kind="pgd", num_steps=8),
        Attack(kind="pgd", num_steps=5, label_smoothing=0.3),
        Attack(kind="mim", num_steps=6, momentum=1.0),
        Attack(kind="mim", num_steps=6, momentum=0.4, label_smoothing=0.1),
        Attack(kind="cw", num_steps=6),
    ],
    ids=lambda attack: f"{attack.kind}{attack.num_steps}",
)
def test_matches_plain_loop(attack: Attack, norm: str, random_start: bool) -> None:
    attack = replace(attack, norm=norm, random_start=random_start, epsilon=0.15, step_size=0.06)
    logits_fn, asked = oracle.recording(oracle.small_network(SHAPE, 4))
    images, labels = batch()
    found = craft(logits_fn, images, labels, attack, torch.Generator().manual_seed(3))
    start = asked[0]
    assert attack.starts_at_random == (not torch.equal(start, images))
    assert attack.starts_at_random == (random_start and attack.kind not in ("fgsm", "bim"))
    assert len(asked) == (1 if attack.kind == "fgsm" else attack.num_steps)
    for i in range(5):
        expected = oracle.attack_one(oracle.small_network(SHAPE, 4), images[i], start[i], int(labels[i]), attack)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-10)
    assert (found - images).abs().max() > 0.01


def linear(weights: Tensor, bias: float = 0.0) -> oracle.LogitsFn:
    """Two classes; the margin of class 0 over class 1 is weights . pixels + bias."""

    def logits(images: Tensor) -> Tensor:
        margin = images.flatten(1) @ weights + bias
        return torch.stack([margin / 2, -margin / 2], 1)

    return logits


def test_fgsm_is_the_sign_of_the_gradient_and_ignores_the_rest() -> None:
    weights = torch.tensor([2.0, -1.0, 0.0, 0.01, -3.0, 1.0, 1.0, -1.0, 4.0, 5.0, -6.0, 0.5])
    images = torch.rand(4, *SHAPE) * 0.6 + 0.2
    labels = torch.tensor([0, 1, 0, 1])
    attack = Attack(kind="fgsm", epsilon=0.1, step_size=0.003, num_steps=9, num_restarts=5)
    found = craft(linear(weights), images, labels, attack)
    away = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    for i in range(4):
        expected = [
            p + 0.1 * away[i].item() * ((w > 0) - (w < 0))
            for p, w in zip(images[i].flatten().tolist(), weights.tolist(), strict=True)
        ]
        assert found[i].flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["bim", "pgd", "mim", "cw"])
def test_linf_reaches_the_worst_case_of_a_linear_network(kind: str) -> None:
    """The least margin in the ball and in [0, 1] is at a corner that can be written down, clipping included."""
    weights = torch.randn(12, dtype=torch.float64)
    images, labels = torch.rand(40, *SHAPE, dtype=torch.float64), torch.randint(2, (40,))
    attack = Attack(kind=kind, epsilon=0.2, step_size=0.05, num_steps=12)  # type: ignore[arg-type]
    found = craft(linear(weights), images, labels, attack)
    for i in range(40):
        away = -1 if labels[i] == 0 else 1
        expected = [
            min(max(p + away * (0.2 if w > 0 else -0.2), 0.0), 1.0)
            for p, w in zip(images[i].flatten().tolist(), weights.tolist(), strict=True)
        ]
        assert found[i].flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["bim", "pgd", "mim", "cw"])
def test_l2_reaches_the_worst_case_of_a_linear_network(kind: str) -> None:
    weights = torch.randn(12, dtype=torch.float64)
    images = torch.rand(20, *SHAPE, dtype=torch.float64) * 0.2 + 0.4
    labels = torch.randint(2, (20,))
    attack = Attack(kind=kind, norm="l2", epsilon=0.3, step_size=0.3, num_steps=60)  # type: ignore[arg-type]
    found = craft(linear(weights), images, labels, attack)
    size = oracle.length(weights.tolist())
    for i in range(20):
        away = -1 if labels[i] == 0 else 1
        perturbation = (found[i] - images[i]).flatten().tolist()
        expected = [away * 0.3 * w / size for w in weights.tolist()]
        assert perturbation == pytest.approx(expected, abs=1e-8)


def test_l2_fgsm_is_one_step_along_the_gradient() -> None:
    weights = torch.tensor([3.0, -4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 12.0])
    found = craft(
        linear(weights), torch.full((1, *SHAPE), 0.5), torch.tensor([1]), Attack(kind="fgsm", norm="l2", epsilon=0.26)
    )
    expected = [0.5 + 0.02 * w for w in weights.tolist()]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_cw_stops_pushing_beyond_its_confidence() -> None:
    """Once the wrong class leads by 50, nothing is gained; the cross-entropy would go on."""
    weights = torch.ones(12, dtype=torch.float64)
    images, labels = torch.full((1, *SHAPE), 0.5, dtype=torch.float64), torch.tensor([0])
    quiet = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 2, "random_start": False}
    cw, bim = Attack(kind="cw", **quiet), Attack(kind="bim", **quiet)  # type: ignore[arg-type]
    led_by_56, led_by_44 = linear(weights, bias=-62.0), linear(weights, bias=-50.0)
    assert torch.equal(craft(led_by_56, images, labels, cw), images)
    assert (craft(led_by_44, images, labels, cw) - images).flatten().tolist() == pytest.approx([-0.1] * 12)
    assert (craft(led_by_44, images, torch.tensor([1]), cw) - images).flatten().tolist() == pytest.approx([0.1] * 12)
    assert (craft(led_by_56, images, torch.tensor([1]), bim) - images).flatten().tolist() == pytest.approx([0.1] * 12)


def test_cw_pushes_the_true_class_against_the_best_wrong_one_only() -> None:
    def logits_fn(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 0, 0] + 1, x[:, 0, 0, 1] + 0.5, x[:, 0, 0, 2]], 1)

    attack = Attack(kind="cw", epsilon=0.1, step_size=0.1, num_steps=1, random_start=False)
    images = torch.full((1, 1, 1, 3), 0.5)
    found = craft(logits_fn, images, torch.tensor([0]), attack) - images
    assert found.flatten().tolist() == pytest.approx([-0.1, 0.1, 0.0], abs=1e-6)
    pgd = craft(logits_fn, images, torch.tensor([0]), replace(attack, kind="pgd")) - images
    assert pgd.flatten().tolist() == pytest.approx([-0.1, 0.1, 0.1], abs=1e-6)


def test_label_smoothing_turns_the_gradient_of_a_confident_network() -> None:
    """Smoothed by 0.5, two classes want probabilities of 3/4 and 1/4; a surer network gains loss by surer still."""
    weights, images = torch.full((12,), 1.0), torch.full((1, *SHAPE), 0.5)
    plain = Attack(kind="bim", epsilon=0.1, step_size=0.1, num_steps=1)
    for smoothing, expected in ((0.0, -0.1), (0.5, 0.1)):
        attack = replace(plain, label_smoothing=smoothing)
        moved = craft(linear(weights), images, torch.tensor([0]), attack) - images
        assert moved.flatten().tolist() == pytest.approx([expected] * 12, abs=1e-6)


def test_momentum_carries_on_where_the_gradient_has_turned() -> None:
    """One pixel whose gradient flips after the first step: MIM goes on, as far as its memory says; PGD turns back."""

    def logits_fn(x: Tensor) -> Tensor:
        score = torch.where(x > 0.52, -0.5 * x, x).flatten(1).sum(1)
        return torch.stack([-score, score], 1)

    images, labels = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    attack = Attack(kind="mim", epsilon=0.3, step_size=0.03, num_steps=3, random_start=False, momentum=1.0)
    # Normalised by their mean size, the gradients are +1, -1, -1: velocities 1, 0, -1.
    assert craft(logits_fn, images, labels, attack).item() == pytest.approx(0.5 + 0.03 + 0 - 0.03)
    # Velocities 1, 1, 1 where the memory grows: 1, 2*1-1, 2*1-1.
    assert craft(logits_fn, images, labels, replace(attack, momentum=2.0)).item() == pytest.approx(0.59)
    # Without memory: up, down to where it was, up again, as plain gradient signs do.
    for other in (replace(attack, momentum=0.0), replace(attack, kind="pgd")):
        assert craft(logits_fn, images, labels, other).item() == pytest.approx(0.53)


def starts(norm: str, width: int, epsilon: float) -> Tensor:
    """Where `pgd` starts from the middle of the cube, as offsets (N, width)."""
    logits_fn, asked = oracle.recording(oracle.small_network((1, 1, width), 2))
    images = torch.full((20_000, 1, 1, width), 0.5, dtype=torch.float64)
    attack = Attack(norm=norm, epsilon=epsilon, num_steps=1)  # type: ignore[arg-type]
    craft(logits_fn, images, torch.zeros(20_000, dtype=torch.int64), attack, torch.Generator().manual_seed(9))
    return (asked[0] - images).flatten(1)


def assert_uniform(values: Tensor) -> None:
    """On [0, 1], by the greatest gap between the two distribution functions; 0.02 is 5 sigma off at 20,000 values."""
    ranks = torch.arange(1, len(values) + 1) / len(values)
    assert (values.sort().values - ranks).abs().max() < 0.02


def test_random_start_is_uniform_in_the_cube() -> None:
    offsets = starts("linf", 2, 0.2)
    for column in offsets.T:
        assert_uniform((column / 0.2 + 1) / 2)
    assert abs(torch.corrcoef(offsets.T)[0, 1]) < 0.03


@pytest.mark.parametrize("width", [1, 2, 5])
def test_random_start_is_uniform_in_the_ball(width: int) -> None:
    offsets = starts("l2", width, 0.2)
    assert_uniform((offsets.norm(dim=1) / 0.2) ** width)
    assert (offsets > 0).double().mean(0).tolist() == pytest.approx([0.5] * width, abs=0.02)


def test_random_start_is_clipped_to_the_image() -> None:
    logits_fn, asked = oracle.recording(oracle.small_network((1, 2, 2), 2))
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    craft(logits_fn, images, torch.tensor([0, 0]), Attack(epsilon=0.5))
    assert asked[0].min() >= 0
    assert asked[0].max() <= 1
