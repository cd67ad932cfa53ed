"""Attacks on the frozen twin: the fates that a plain loop on the network itself finds, whatever the twin does."""

from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tla_service.attacks import Attack, attack_images
from tla_service.attacks.autoattack import run_autoattack
from tla_service.evaluation import shards as sh
from tla_service.evaluation.suite import AttackMeasurement
from tla_service.models import ModelOutput, build_model
from tla_service.models.frozen import FrozenTwin
from tla_service.runtime import generator

CPU = torch.device("cpu")
EPSILON = 0.01


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """BatchNorms with statistics and scales that are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model("mnist_cnn", 4, (1, 8, 8))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
        for _ in range(3):
            network(torch.rand(32, 1, 8, 8))
        with torch.no_grad():
            # No class outweighs the others, else no attack succeeds.
            logits = network.eval()(torch.rand(64, 1, 8, 8)).logits
            network.fc.bias -= logits.mean(0)
    return network


@pytest.fixture(scope="module")
def pictures(network: nn.Module) -> tuple[Tensor, Tensor]:
    """uint8 images, every fifth labelled wrongly."""
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = network(images / 255).logits.argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return images, labels


def fates(network: nn.Module, pictures: tuple[Tensor, Tensor], measurement: AttackMeasurement) -> dict[str, Any]:
    shard = sh.Shard(network, None, *pictures, np.arange(len(pictures[1])), CPU)
    return measurement.merge([measurement.run(shard)]).broken_at


def test_fates_are_those_of_a_plain_loop_on_the_network(network: nn.Module, pictures: tuple[Tensor, Tensor]) -> None:
    attack = Attack(epsilon=EPSILON, step_size=EPSILON / 4, num_steps=12, num_restarts=3)
    images, labels = pictures[0] / 255, pictures[1]
    assert sh.frozen(network, images) is not network
    found = fates(network, pictures, AttackMeasurement({"pgd": attack}, {}, None, 0, 20))["pgd"]
    expected = attack_images(
        lambda batch: network(batch).logits, images, labels, attack, generator(CPU, 0, crc32(b"pgd"), 0)
    ).broken_at
    assert found.tolist() == expected.tolist()
    assert len(set(found.tolist())) >= 3


def distorted(twin: nn.Module, where: Any) -> nn.Module:
    """The twin, with the first two logits exchanged on some images."""

    class Distorted(nn.Module):
        def forward(self, batch: Tensor) -> ModelOutput:
            logits, embeddings = twin(batch)
            exchanged = logits[:, [1, 0, 2, 3]]
            return ModelOutput(torch.where(where(batch)[:, None], exchanged, logits), embeddings)

    return Distorted()


def test_a_twin_that_computes_something_else_is_not_used(
    network: nn.Module, pictures: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(FrozenTwin):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            # Off the values that images have: right on clean ones.
            self.module = distorted(self.module, lambda batch: ((batch * 255) % 1).flatten(1).sum(1) > 1)

    monkeypatch.setattr(sh, "FrozenTwin", Wrong)
    assert sh.frozen(network, pictures[0] / 255) is network


def test_a_twin_with_other_gradients_is_not_used(
    network: nn.Module, pictures: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Misleading(nn.Module):
        def __init__(self, twin: nn.Module) -> None:
            super().__init__()
            self.twin = twin

        def forward(self, batch: Tensor) -> ModelOutput:
            return self.twin(batch.detach() + (batch - batch.detach()) / 2)

    class Wrong(FrozenTwin):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.module = Misleading(self.module)

    monkeypatch.setattr(sh, "FrozenTwin", Wrong)
    assert sh.frozen(network, pictures[0] / 255) is network


def test_activations_that_work_in_place_are_attacked() -> None:
    """As in most networks of torchvision, whose BatchNorm is folded into the first convolution."""
    network = build_model("torchvision:resnet18", 4, (3, 32, 32)).eval()
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    labels = network(pictures / 255).logits.argmax(1)
    measurement = AttackMeasurement({"pgd": Attack(num_steps=2)}, {}, None, 0, 4)
    assert sh.frozen(network, pictures / 255) is not network
    assert len(fates(network, (pictures, labels), measurement)["pgd"]) == 4


def test_a_network_that_cannot_be_copied_is_attacked_itself() -> None:
    class Single(nn.Module):
        def __deepcopy__(self, memo: Any) -> "Single":
            raise TypeError

        def forward(self, batch: Tensor) -> ModelOutput:
            return ModelOutput(batch.flatten(1)[:, :3], batch.flatten(1))

    only = Single().eval()
    assert sh.frozen(only, torch.rand(2, 1, 4, 4)) is only


def test_autoattack_attacks_again_what_the_network_does_not_confirm(
    network: nn.Module, pictures: tuple[Tensor, Tensor]
) -> None:
    images, labels = pictures[0][:6] / 255, pictures[1][:6]
    logits_fn = sh.logits_of(network)
    # Wrong about every image once it is perturbed: it calls all of them broken at once.
    wrong = distorted(network, lambda batch: ((batch * 255) % 1).flatten(1).sum(1) > 1)

    def attacked(**options: Any) -> list[int]:
        result = run_autoattack(
            logits_fn, images, labels, norm="linf", epsilon=EPSILON, seed=0, batch_size=20, only=("apgd-ce",), **options
        )
        broken: list[int] = result.broken_at.tolist()
        assert torch.equal(logits_fn(result.adversarial).argmax(1) == labels, result.robust)
        return broken

    expected = attacked()
    assert len(set(expected)) == 3
    assert attacked(crafted_on=sh.logits_of(sh.frozen(network, images))) == expected
    assert attacked(crafted_on=sh.logits_of(wrong)) == expected
