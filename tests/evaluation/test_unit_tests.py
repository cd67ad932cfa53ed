"""Planted adversarial examples are found by attacks that work, and missed on networks that mask their gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.evaluation.test_audit import ATTACK, LargeLogits, Masked, Quantised, trained
from tla_service.attacks import Attack, attack_images
from tla_service.config import DataConfig
from tla_service.data import load_dataset
from tla_service.evaluation import unit_tests as ut
from tla_service.evaluation.results import UnitTests
from tla_service.evaluation.shards import Shard, logits_of
from tla_service.models import ModelOutput, build_model
from tla_service.models.wrapped import take_embedding, wrap

CPU = torch.device("cpu")
IMAGES = 24
ATTACKS = {"fgsm": Attack("fgsm", epsilon=0.15, num_steps=1), "pgd15": ATTACK}


class Shattered(Masked):
    """A fast ripple on the pixels: gradients point everywhere, and lead nowhere."""

    def forward(self, images: Tensor) -> ModelOutput:
        return super().forward(images + 0.05 * (1000 * images).sin())


def measured(network: nn.Module, **changes: Any) -> UnitTests:
    data = load_dataset(DataConfig(name="digits"))
    chosen = torch.arange(IMAGES)
    fields = {"attacks": ATTACKS, "norm": "linf", "epsilon": 0.15, "autoattack": False, "seed": 0, "batch_size": 500}
    measurement = ut.UnitTestMeasurement(**fields | changes)
    parts = [
        measurement.run(Shard(network, None, data.test.fetch(rows), data.test.labels[rows], rows.numpy(), CPU))
        for rows in chosen.split(16)
    ]
    return measurement.merge(parts)


def rates(found: UnitTests) -> dict[str, float]:
    return {test.attack: test.found.estimate or 0.0 for test in found.attacks}


def test_attacks_on_an_honest_network_find_what_was_planted() -> None:
    network = trained(0, robust=True)
    found = measured(network, autoattack=True)
    assert found.why == ""
    assert found.images == IMAGES
    assert found.random.images >= 20
    assert (found.random.estimate or 0) <= 0.1
    assert set(rates(found)) == {"fgsm", "pgd15", "apgd-ce"}
    assert min(rates(found)["pgd15"], rates(found)["apgd-ce"]) >= 0.9
    assert {test.attack: test.judged for test in found.attacks} == {"fgsm": False, "pgd15": True, "apgd-ce": True}
    check = ut.unit_test_check(found)
    assert (check.outcome, check.figure) == ("passed", min(rates(found)["pgd15"], rates(found)["apgd-ce"]))
    assert all(name in check.statement for name in rates(found))
    assert measured(network).attacks == found.attacks[:2]


def test_a_weakness_that_attacks_pass_by_is_found_out() -> None:
    """An attacker who knows the network without what shatters its gradients breaks it; PGD on the whole does not."""
    inner = trained(0, robust=False)
    whole = Shattered(inner)
    data = load_dataset(DataConfig(name="digits"))
    images, labels = data.test.fetch(torch.arange(60)).float() / 255, data.test.labels[:60]
    standing = [
        attack_images(logits_of(whole), images, labels, ATTACK, torch.Generator().manual_seed(0), crafted_on).robust
        for crafted_on in (None, logits_of(inner))
    ]
    assert standing[0].float().mean() > standing[1].float().mean() + 0.2
    found = measured(whole)
    assert ut.unit_test_check(found).outcome == "failed"


@pytest.mark.parametrize("mask", [LargeLogits, Quantised])
def test_attacks_on_a_masked_network_miss_what_was_planted(mask: type[Masked]) -> None:
    found = measured(mask(trained(0, robust=False)))
    assert found.why == ""
    assert rates(found)["pgd15"] < 0.5
    assert ut.unit_test_check(found).outcome == "failed"


def test_an_attack_that_hardly_moves_fails() -> None:
    found = measured(trained(0, robust=True), attacks={"pgd2": Attack(epsilon=0.15, step_size=1e-4, num_steps=2)})
    assert ut.unit_test_check(found).outcome == "failed"


def test_examples_are_planted_in_l2_too() -> None:
    attack = Attack(norm="l2", epsilon=0.6, step_size=0.1, num_steps=15)
    found = measured(trained(0, robust=True), attacks={"pgd15": attack}, norm="l2", epsilon=0.6)
    assert found.random.images >= 20
    assert rates(found)["pgd15"] >= 0.9


def test_what_cannot_be_planted_is_named() -> None:
    everywhere = measured(trained(0, robust=True), attacks={"pgd": Attack(epsilon=0.6)}, epsilon=0.6)
    assert "the balls of different images overlap" in everywhere.why
    check = ut.unit_test_check(everywhere)
    assert (check.outcome, check.figure, check.statement) == ("not run", None, everywhere.why)
    assert ut.unit_test_check(None).outcome == "not run"


def test_examples_that_random_sampling_finds_prove_nothing() -> None:
    measurement = ut.UnitTestMeasurement(ATTACKS, "linf", 0.15, autoattack=False, seed=0, batch_size=9)
    ones = np.ones(20, dtype=bool)
    found = measurement.merge([{"tried": np.array(20), "random": ones, "found/pgd15": ones}])
    assert "random sampling finds 100.0%" in found.why
    assert ut.unit_test_check(found).outcome == "not run"


def test_a_network_without_a_readout_of_its_embedding_is_named() -> None:
    tapped = build_model("digits_cnn", 10, (1, 8, 8))
    take_embedding(tapped, "convolutions.1", (1, 8, 8))
    assert "output of convolutions.1" in measured(tapped.eval()).why
    assert "model.embedding" in ut.unit_test_check(measured(tapped)).statement

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            return 2 * self.linear(images.flatten(1))

    headless = wrap("scaled", Scaled(), nn.Identity(), 10, (1, 8, 8), "linear")
    assert "no final linear layer" in measured(headless.eval()).why


def test_a_network_of_others_is_tested_at_its_linear_head() -> None:
    whole = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    torch.manual_seed(0)
    for module in whole:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    network = wrap("mlp", whole, nn.Identity(), 10, (1, 8, 8), None)
    assert rates(measured(network.eval()))["pgd15"] >= 0.9


def test_the_readout_is_the_ridge_discriminant() -> None:
    random = torch.Generator().manual_seed(0)
    for dimensions in (5, 60):
        inner, planted = torch.randn(30, dimensions, generator=random), torch.randn(dimensions, generator=random)
        centred = (inner - inner.mean(0)).double().numpy()
        scatter = sum(np.outer(row, row) for row in centred)
        ridge = np.trace(scatter) / min(30, dimensions)
        expected = np.linalg.solve(scatter + ridge * np.eye(dimensions), (planted - inner.mean(0)).double().numpy())
        found = ut._discriminant(inner, planted)
        np.testing.assert_allclose(found.numpy(), expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-6)


def test_each_point_is_judged_by_the_readout_of_its_own_image() -> None:
    """Attacks drop images and change their order."""
    network, ball = trained(0, robust=True), Attack(epsilon=0.15)
    data = load_dataset(DataConfig(name="digits"))
    images = ut._disjoint(data.test.fetch(torch.arange(8)).float() / 255, ball)
    random = torch.Generator().manual_seed(0)
    heads = [ut._plant(network, image, ball, random, 500) for image in images]
    planted = [(image, head) for image, head in zip(images, heads, strict=True) if head is not None]
    logits_fn = ut._binary(network, torch.stack([image for image, _ in planted]), [head for _, head in planted], ball)
    order = torch.randperm(len(planted), generator=random)[1:]
    points = torch.cat([ut._outer(planted[place][0], 1, ball, random) for place in order])
    assert (points - torch.stack([planted[place][0] for place in order])).abs().max() <= 0.15 + 1e-6
    with torch.no_grad():
        embeddings, found = network(points).embeddings, logits_fn(points)
    for row, place in enumerate(order.tolist()):
        head = planted[place][1]
        margin = head.scale * (embeddings[row] @ head.weight - head.threshold)
        torch.testing.assert_close(found[row], torch.stack([-margin, margin]), rtol=1e-3, atol=1e-4)
