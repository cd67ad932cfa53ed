"""Whatever the adversary: inside the ball, inside [0, 1], finite, and nothing attached."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attacks import oracle
from tla_service.attacks import Attack, attack_images, craft

KINDS = ("fgsm", "bim", "pgd", "mim", "cw")
NORMS = ("linf", "l2")

attacks = st.builds(
    Attack,
    kind=st.sampled_from(KINDS),
    norm=st.sampled_from(NORMS),
    epsilon=st.floats(1e-3, 3),
    step_size=st.floats(1e-4, 5),
    num_steps=st.integers(1, 4),
    num_restarts=st.integers(1, 3),
    random_start=st.booleans(),
    momentum=st.sampled_from([0.0, 0.5, 1.0]),
    label_smoothing=st.sampled_from([0.0, 0.2]),
)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def assert_allowed(adversarial: Tensor, images: Tensor, attack: Attack) -> None:
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    assert adversarial.grad_fn is None
    assert adversarial.isfinite().all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    # Beyond epsilon, only what storing a pixel of [0, 1] in this precision costs.
    rounding = torch.finfo(images.dtype).eps
    perturbation = (adversarial.double() - images.double()).flatten(1)
    if attack.norm == "linf":
        size = perturbation.abs().amax(1)
    else:
        size, rounding = perturbation.norm(dim=1), rounding * math.sqrt(perturbation.shape[1])
    assert size.max() <= attack.epsilon * (1 + 1e-6) + rounding


@settings(max_examples=150)
@given(attacks, shapes, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31), st.booleans())
def test_result_is_allowed(
    attack: Attack, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int, saturated: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(shape, generator=random, dtype=dtype)
    images = images.round() if saturated else images
    before = images.clone()
    labels = torch.randint(3, shape[:1], generator=random)
    logits_fn = oracle.small_network(shape[1:], 3)
    assert_allowed(craft(logits_fn, images, labels, attack, random), images, attack)
    attacked = attack_images(logits_fn, images, labels, attack, random)
    worst, robust = attacked.images, attacked.robust
    assert_allowed(worst, images, attack)
    assert robust.dtype == torch.bool
    assert robust.shape == labels.shape
    assert torch.equal(robust, logits_fn(worst).argmax(1) == labels)
    assert torch.equal(images, before)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradient_moves_nothing(kind: str, norm: str) -> None:
    """A network without an opinion: the gradient is exactly zero, and a division by its length would give NaN."""
    images, labels = torch.rand(4, 1, 3, 3), torch.zeros(4, dtype=torch.int64)
    weight = torch.zeros(9, 3)
    attack = Attack(kind=kind, norm=norm, epsilon=0.1, step_size=0.05, num_steps=3, random_start=False)  # type: ignore[arg-type]
    assert torch.equal(craft(lambda x: x.flatten(1) @ weight, images, labels, attack), images)
    random = Attack(kind=kind, norm=norm, epsilon=0.1, step_size=0.05, num_steps=3)  # type: ignore[arg-type]
    assert_allowed(craft(lambda x: x.flatten(1) @ weight, images, labels, random), images, random)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_image_with_zero_gradient_does_not_hold_up_the_others(kind: str, norm: str) -> None:
    images, labels = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    weight = torch.randn(4, 3)

    def logits_fn(x: Tensor) -> Tensor:
        return (x.flatten(1) @ weight) * torch.tensor([[1.0], [0.0], [1.0]])

    attack = Attack(kind=kind, norm=norm, epsilon=0.1, step_size=0.05, random_start=False)  # type: ignore[arg-type]
    adversarial = craft(logits_fn, images, labels, attack)
    moved = (adversarial - images).flatten(1).norm(dim=1) > 1e-3
    assert moved.tolist() == [True, False, True]


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-15, 1.0, 1e15, 1e25])
@pytest.mark.parametrize("kind", ["pgd", "mim", "fgsm"])
def test_l2_step_has_its_length_whatever_the_gradient_s_size(kind: str, scale: float) -> None:
    """Saturated networks have gradients whose squares vanish in float32; the step is a direction all the same."""
    gradient = torch.tensor([3.0, -4.0, 0.0, 12.0]) * scale

    def logits_fn(x: Tensor) -> Tensor:
        score = (x - x.detach()).flatten(1) @ gradient
        return torch.stack([-score, torch.zeros_like(score)], 1)

    images = torch.full((1, 1, 2, 2), 0.5)
    attack = Attack(kind=kind, norm="l2", epsilon=0.2, step_size=0.05, num_steps=1, random_start=False)  # type: ignore[arg-type]
    perturbation = craft(logits_fn, images, torch.tensor([0]), attack) - images
    length = 0.2 if kind == "fgsm" else 0.05
    expected = torch.tensor([3.0, -4.0, 0.0, 12.0]) / 13 * length
    torch.testing.assert_close(perturbation.flatten(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_breaks_nothing(kind: str, norm: str) -> None:
    """Of two images, the first has a gradient of NaN in a pixel, the second an infinite one."""

    def logits_fn(x: Tensor) -> Tensor:
        pixel = x[:, 0, 0, 0]
        still = pixel - pixel.detach()
        spoilt = torch.stack([still[0].abs().sqrt(), still[1].sqrt()])
        return torch.stack([1 - spoilt - x.flatten(1).sum(1) / 1000, 0 * pixel], 1)

    attack = Attack(kind=kind, norm=norm, epsilon=0.1, step_size=0.05, num_steps=2, random_start=False)  # type: ignore[arg-type]
    images, labels = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    adversarial = craft(logits_fn, images, labels, attack)
    assert_allowed(adversarial, images, attack)
    if kind != "mim":  # which divides by the mean of the gradient
        assert (adversarial - images)[1, 0, 0, 0] == pytest.approx(0.1)
    assert attack_images(logits_fn, images, labels, attack).robust.all()


@pytest.mark.parametrize("norm", NORMS)
def test_empty_batch_stays_empty(norm: str) -> None:
    images, labels = torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.int64)
    attack = Attack(norm=norm)  # type: ignore[arg-type]
    logits_fn = oracle.small_network((1, 2, 2), 3)
    attacked = attack_images(logits_fn, images, labels, attack)
    worst, robust = attacked.images, attacked.robust
    assert worst.shape == images.shape
    assert robust.shape == (0,)
    assert craft(logits_fn, images, labels, attack).shape == images.shape


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_logits_are_judged_in_float32(kind: str, norm: str, narrow: torch.dtype) -> None:
    network = oracle.small_network((1, 3, 3), 4)
    images, labels = torch.rand(6, 1, 3, 3), torch.randint(4, (6,))
    attack = Attack(kind=kind, norm=norm, epsilon=0.1, step_size=0.03, num_steps=4, num_restarts=2)  # type: ignore[arg-type]
    narrowly, widely = (
        craft(fn, images, labels, attack, torch.Generator().manual_seed(5))
        for fn in (lambda x: network(x).to(narrow), lambda x: network(x).to(narrow).float())
    )
    assert torch.equal(narrowly, widely)
    attacked = attack_images(lambda x: network(x).to(narrow), images, labels, attack)
    worst, robust = attacked.images, attacked.robust
    assert_allowed(worst, images, attack)
    assert torch.equal(robust, network(worst).to(narrow).argmax(1) == labels)


@pytest.mark.parametrize("label", [0, 1])
def test_logits_that_are_not_a_number_are_broken_whatever_the_class(label: int) -> None:
    """Of NaN alone argmax is class 0."""
    images = torch.full((4, 1, 6, 6), 0.5)

    def network(pixels: Tensor) -> Tensor:
        moved = (pixels - 0.5).abs().amax((1, 2, 3)) > 1e-6
        right = 5.0 * torch.nn.functional.one_hot(torch.full((len(pixels),), label), 4) + pixels.mean()
        return torch.where(moved[:, None], torch.nan, right)

    labels = torch.full((4,), label)
    found = attack_images(
        network, images, labels, Attack("pgd", "linf", 0.1, 0.05, 2), torch.Generator().manual_seed(0)
    )
    assert not found.robust.any()
