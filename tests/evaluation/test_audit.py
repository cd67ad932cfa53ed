"""The audit passes an honestly trained network and fails masked ones, naming the checks."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tla_service.attacks import Attack, craft
from tla_service.config import DataConfig
from tla_service.data import load_dataset
from tla_service.errors import ConfigError
from tla_service.evaluation.audit import CHECKS, AuditMeasurement
from tla_service.evaluation.results import Audit
from tla_service.evaluation.shards import Shard
from tla_service.evaluation.surrogate import SurrogateMeasurement, TrainedSurrogate, surrogate_rows
from tla_service.models import ModelOutput, build_model

CPU = torch.device("cpu")
ATTACK = Attack(epsilon=0.15, step_size=0.02, num_steps=15)
IMAGES = 60


class Masked(nn.Module):
    """A network behind something that spoils gradients and adds no robustness."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> ModelOutput:
        output: ModelOutput = self.network(images)
        return output


class LargeLogits(Masked):
    """The softmax saturates, so the cross-entropy has no gradient."""

    def forward(self, images: Tensor) -> ModelOutput:
        output = super().forward(images)
        return ModelOutput(output.logits * 1e4, output.embeddings)


class Quantised(Masked):
    """Rounding has a gradient of zero."""

    def forward(self, images: Tensor) -> ModelOutput:
        return super().forward((images * 8).round() / 8)


class Saturated(Masked):
    """A steep squashing of the pixels: gradients are there, and mislead."""

    def forward(self, images: Tensor) -> ModelOutput:
        return super().forward((200 * (images - 0.5)).sigmoid())


class HangsOnRounding(Masked):
    """Adds what the rounding of bfloat16 turns into something else."""

    def forward(self, images: Tensor) -> ModelOutput:
        output = super().forward(images)
        # 1.001 is 1 in bfloat16.
        rounding = 1.001 - F.linear(torch.tensor([[1.001]]), torch.ones(1, 1)).float()
        return ModelOutput(output.logits + 1e6 * rounding * torch.eye(10)[0], output.embeddings)


@cache
def trained(seed: int, robust: bool) -> nn.Module:
    """A digits network after a little training; adversarial if it is to be robust."""
    data = load_dataset(DataConfig(name="digits"))
    images, labels = data.train.fetch(torch.arange(len(data.train))).float() / 255, data.train.labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_model("digits_cnn", 10, (1, 8, 8))
        optimizer = torch.optim.Adam(network.parameters(), 0.005)
        attack = Attack(epsilon=0.15, step_size=0.08, num_steps=3)
        for epoch in range(10 if robust else 4):
            for batch in torch.randperm(len(labels)).split(128):
                pixels = images[batch]
                if robust and epoch > 1:
                    pixels = craft(lambda x: network(x).logits, pixels, labels[batch], attack)
                optimizer.zero_grad()
                F.cross_entropy(network(pixels).logits, labels[batch]).backward()
                optimizer.step()
    return network.eval()


def audited(network: nn.Module, *, surrogate: nn.Module | None = None, **changes: Any) -> Audit:
    data = load_dataset(DataConfig(name="digits"))
    chosen = torch.arange(IMAGES)
    measurement = AuditMeasurement(**{"attack": ATTACK, "seed": 0, "batch_size": 64, "square_queries": 200} | changes)
    shard = Shard(network, surrogate, data.test.fetch(chosen), data.test.labels[chosen], chosen.numpy(), CPU)
    return measurement.merge([measurement.run(shard)])


def failed(result: Audit) -> set[str]:
    return {check.name for check in result.checks if check.outcome == "failed"}


def test_an_honest_network_is_trusted() -> None:
    network = trained(0, robust=True)
    result = audited(network, surrogate=trained(1, robust=False))
    assert failed(result) == set()
    assert result.trusted
    assert len(result.checks) == 10
    assert len({check.name for check in result.checks}) == 10
    assert all(check.statement and check.meaning for check in result.checks)
    assert not network.training
    assert result.images == IMAGES


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (
            LargeLogits,
            {"gradients_do_not_vanish", "accuracy_at_large_epsilon", "cross_entropy_against_margin"}
            | {"white_box_against_transfer", "white_box_against_square"},
        ),
        (
            Quantised,
            {"gradients_do_not_vanish", "accuracy_at_large_epsilon"}
            | {"white_box_against_transfer", "white_box_against_square"},
        ),
        (Saturated, {"white_box_against_transfer", "white_box_against_square"}),
    ],
)
def test_a_masked_network_is_found_out(mask: type[Masked], found: set[str]) -> None:
    """The robust accuracy that PGD reports for it is far too high, and the audit says why not to believe it."""
    result = audited(mask(trained(0, robust=False)), surrogate=trained(1, robust=False))
    assert not result.trusted
    assert failed(result) >= found
    zero = next(check for check in result.checks if check.name == "gradients_do_not_vanish")
    assert mask is Saturated or (zero.figure is not None and zero.figure > 0.5)


def test_rounding_that_decides_is_found_out() -> None:
    result = audited(HangsOnRounding(trained(0, robust=True)), surrogate=trained(1, robust=False))
    assert "bfloat16_agrees_with_float32" in failed(result)


def not_run(result: Audit) -> dict[str, str]:
    return {check.name: check.statement for check in result.checks if check.outcome == "not run"}


def test_a_check_that_could_not_run_neither_passes_nor_fails() -> None:
    result = audited(trained(0, robust=True), no_surrogate="none could be trained")
    assert failed(result) == set()
    assert not_run(result) == {"white_box_against_transfer": "none could be trained"}
    assert result.trusted
    assert next(check for check in result.checks if check.outcome == "not run").figure is None


def test_a_surrogate_that_knows_little_says_nothing() -> None:
    torch.manual_seed(0)
    result = audited(trained(0, robust=True), surrogate=build_model("digits_cnn", 10, (1, 8, 8)).eval())
    assert "classifies only" in not_run(result)["white_box_against_transfer"]


def test_square_that_cannot_run_does_not_pass() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))

        def forward(self, images: Tensor) -> ModelOutput:
            features = (images - 0.5).flatten(1)
            return ModelOutput(features @ self.weight.T, features)

    images = 0.5 + 0.1 * torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    network = Small()
    attack = Attack(norm="l2", epsilon=0.01, step_size=0.002, num_steps=10)
    labels = network(images.clamp(0, 1)).logits.argmax(1)
    measurement = AuditMeasurement(attack, seed=0, batch_size=20)
    shard = Shard(network, None, images.clamp(0, 1), labels, np.arange(20), CPU)
    result = measurement.merge([measurement.run(shard)])
    assert "needs images of 5 rows" in not_run(result)["white_box_against_square"]


def surrogate_on(rows: Tensor, measurement: SurrogateMeasurement) -> TrainedSurrogate:
    data = load_dataset(DataConfig(name="digits"))
    shard = Shard(nn.Identity(), None, data.train.fetch(rows), data.train.labels[rows], rows.numpy(), CPU)
    return measurement.merge([measurement.run(shard)])


@cache
def own_surrogate() -> nn.Module:
    data = load_dataset(DataConfig(name="digits"))
    rows = surrogate_rows(data.train.labels, data.image_shape)
    assert len(rows) == len(data.train)
    found = surrogate_on(rows, SurrogateMeasurement("linf", 0.15, 10, seed=5))
    facts = found.facts
    assert facts.held_out + facts.images == len(rows)
    assert (facts.clean_accuracy or 0) > 0.9
    network = build_model(facts.architecture, 10, data.image_shape)
    network.load_state_dict(found.weights)
    return network.eval()


def test_the_surrogate_trained_on_the_spot_trusts_an_honest_network() -> None:
    result = audited(trained(0, robust=True), surrogate=own_surrogate())
    assert (failed(result), not_run(result)) == (set(), {})


@pytest.mark.parametrize("mask", [LargeLogits, Quantised])
def test_the_surrogate_trained_on_the_spot_finds_masks_out(mask: type[Masked]) -> None:
    result = audited(mask(trained(0, robust=False)), surrogate=own_surrogate(), square_queries=5)
    assert "white_box_against_transfer" in failed(result)


def test_the_surrogate_is_fixed_by_its_seed_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tla_service.evaluation.surrogate._STEPS", 10)
    rows, state = torch.arange(100), torch.get_rng_state()
    one, two, other = (surrogate_on(rows, SurrogateMeasurement("l2", 0.6, 10, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, two.weights[name]) for name, value in one.weights.items())
    assert not torch.equal(one.weights["fc.weight"], other.weights["fc.weight"])
    labels = torch.arange(30_000) % 10
    assert len(surrogate_rows(labels, (3, 32, 32))) == 10_000
    assert len(surrogate_rows(labels, (3, 224, 224))) * 3 * 224 * 224 <= 2**28


def test_an_attack_stopped_early_is_found_out() -> None:
    short = Attack(epsilon=0.15, step_size=0.005, num_steps=4)
    result = audited(trained(0, robust=True), surrogate=trained(1, robust=False), attack=short, square_queries=20)
    assert failed(result) >= {"more_steps_gain_little", "loss_has_settled", "iterative_against_single_step"}


def test_thresholds_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (_, meaning) in CHECKS.items():
        monkeypatch.setitem(CHECKS, name, (2.0 if name == "bfloat16_agrees_with_float32" else -2.0, meaning))
    result = audited(trained(0, robust=True), surrogate=trained(1, robust=False), square_queries=5)
    assert failed(result) == {check.name for check in result.checks}


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above 0.3, by a linear readout; logits of so many nats."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: Tensor) -> ModelOutput:
        margin = self.scale * (images.mean((1, 2, 3)) - 0.3)[:, None]
        return ModelOutput(torch.cat([-margin, margin], 1), images.flatten(1))


def brightness_audited(scale: float) -> Audit:
    """An audit of images that are dark or bright, far from the boundary."""
    labels = torch.arange(20) % 2
    images = (0.1 + 0.75 * labels[:, None, None, None] + 0.05 * torch.rand(20, 1, 8, 8)).clamp(0, 1)
    measurement = AuditMeasurement(ATTACK, seed=0, batch_size=20, square_queries=5)
    return measurement.merge([measurement.run(Shard(Brightness(scale), None, images, labels, np.arange(20), CPU))])


def test_what_is_right_about_grey_may_stand_at_any_radius() -> None:
    """No perturbation of half the range makes a bright image dark for this network; dark images fall."""
    far = next(check for check in brightness_audited(10.0).checks if check.name == "accuracy_at_large_epsilon")
    assert (far.outcome, far.figure) == ("passed", 0.0)


def test_gradients_whose_squares_vanish_are_gradients() -> None:
    found = next(check for check in brightness_audited(60.0).checks if check.name == "gradients_do_not_vanish")
    assert found.outcome == "passed", found.statement
    assert float(found.statement.rpartition(" ")[2]) < 1e-15


def test_logits_that_are_not_finite_are_refused() -> None:
    class Nothing(Masked):
        def forward(self, images: Tensor) -> ModelOutput:
            output = super().forward(images)
            return ModelOutput(output.logits * float("nan"), output.embeddings)

    with pytest.raises(ConfigError, match="not finite"):
        audited(Nothing(trained(1, robust=False)))
