"""Attacks that only training uses: TRADES' divergence and N-FGSM, image by image in plain Python."""

import torch
import torch.nn.functional as F

from tests.attacks import oracle
from tests.attacks.oracle import SHAPE, batch
from tla_service.attacks import Attack, craft, craft_noisy_step


def test_the_divergence_is_ascended_from_a_hair_s_breadth_away() -> None:
    """x' <- project(x' + step * sign(gradient of KL(p(x) || p(x')))), x' = x + 0.001 N(0, 1) at first."""
    attack = Attack(objective="kl", epsilon=0.15, step_size=0.06, num_steps=4)
    network = oracle.small_network(SHAPE, 4)
    logits_fn, asked = oracle.recording(network)
    images, labels = batch()
    found = craft(logits_fn, images, labels, attack, torch.Generator().manual_seed(3))
    clean, start = asked[0], asked[1]
    assert torch.equal(clean, images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(start, (images + 0.001 * noise).clamp(0, 1))
    for i in range(5):
        x = start[i : i + 1]
        p = F.softmax(network(images[i : i + 1]), 1).detach()
        for _ in range(4):
            x = x.detach().requires_grad_()
            q = F.softmax(network(x), 1)
            (p * (p / q).log()).sum().backward()
            assert x.grad is not None
            x = (x + 0.06 * x.grad.sign()).detach()
            x = torch.minimum(torch.maximum(x, images[i] - 0.15), images[i] + 0.15).clamp(0, 1)
        torch.testing.assert_close(found[i], x[0], rtol=0, atol=1e-10)
    other = craft(logits_fn, images, (labels + 1) % 4, attack, torch.Generator().manual_seed(3))
    assert torch.equal(found, other)


def test_the_noisy_step_is_not_projected() -> None:
    """x + eta + epsilon * sign(gradient at x + eta), eta uniform in (-k epsilon, k epsilon); then into [0, 1]."""
    attack, noise = Attack(epsilon=0.05, label_smoothing=0.1), 2.0
    network = oracle.small_network(SHAPE, 4)
    images, labels = batch()
    found = craft_noisy_step(network, images, labels, attack, noise, torch.Generator().manual_seed(5))
    draw = torch.rand(images.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for i in range(5):
        x = (images[i] + (2 * draw[i] - 1) * 0.1).clamp(0, 1)[None].requires_grad_()
        F.cross_entropy(network(x), labels[i : i + 1], label_smoothing=0.1).backward()
        assert x.grad is not None
        expected = (x + 0.05 * x.grad.sign()).clamp(0, 1).detach()[0]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-12)
    distance = (found - images).abs().max()
    assert 0.05 < distance <= 0.15 + 1e-12
