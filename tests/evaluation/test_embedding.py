"""Embeddings: order, mode, precision, and attacks on every image."""

import numpy as np
import pytest
import torch
from torch import nn

from tla_service.attacks import Attack
from tla_service.data import Batch
from tla_service.errors import ConfigError
from tla_service.evaluation.embedding import Embedded, attacked, embed
from tla_service.inference.detector import unit_rows
from tla_service.models import ModelOutput


class Tiny(nn.Module):
    """A linear network whose dropout and BatchNorm betray a wrong mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(4, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, images: torch.Tensor) -> ModelOutput:
        embeddings = self.drop(self.first(self.norm(images.flatten(1))))
        return ModelOutput(self.fc(embeddings), embeddings)


@pytest.fixture
def network() -> Tiny:
    return Tiny().train()


def batches(*sizes: int) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    return [Batch(torch.rand(n, 1, 2, 2, generator=random), torch.randint(3, (n,), generator=random)) for n in sizes]


ATTACK = Attack(epsilon=0.2, step_size=0.1, num_steps=3)


def test_rows_are_those_of_single_images_in_order(network: Tiny) -> None:
    given = batches(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = embed(network, given)
    assert network.training
    assert found.embeddings.dtype == found.logits.dtype == np.float32
    assert found.labels.tolist() == torch.cat([batch.labels for batch in given]).tolist()
    network.eval()
    images = torch.cat([batch.images for batch in given])
    for row, image in enumerate(images):
        with torch.no_grad():
            output = network(image[None])
        np.testing.assert_allclose(found.embeddings[row], output.embeddings[0], atol=1e-6)
        np.testing.assert_allclose(found.logits[row], output.logits[0], atol=1e-6)
        assert found.predictions[row] == output.logits.argmax()
        assert found.max_softmax[row] == pytest.approx(float(output.logits.softmax(1).max()), abs=1e-6)


def test_max_softmax_of_huge_logits_is_finite() -> None:
    logits = np.array([[1e30, 0], [0, 0]], np.float32)
    found = Embedded(np.zeros((2, 1), np.float32), logits, np.zeros(2, np.int64))
    assert found.max_softmax.tolist() == [1, 0.5]
    assert found.correct.tolist() == [True, True], "the lowest class of equals"


def test_attacked_images_stay_in_the_ball_and_wrong_ones_are_attacked_too(network: Tiny) -> None:
    given = batches(20, 12)
    clean = embed(network, given)
    assert 0 < clean.correct.sum() < 32, "the network is to be right and wrong"
    images = torch.cat([batch.images for batch in given]).numpy()
    made = attacked(network, given, ATTACK, seed=3)
    assert [len(batch.labels) for batch in made] == [20, 12]
    assert torch.cat([batch.labels for batch in made]).tolist() == clean.labels.tolist()
    moved = np.abs(torch.cat([batch.images for batch in made]).numpy() - images).max((1, 2, 3))
    assert 0 < moved.min() <= moved.max() <= 0.2 + 1e-6
    assert embed(network, made).correct.sum() <= clean.correct.sum()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.training, "the mode comes back"


def test_the_seed_fixes_the_attack(network: Tiny) -> None:
    first, second, other = (attacked(network, batches(8, 8), ATTACK, seed)[1].images for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_broken_networks_are_refused(network: Tiny) -> None:
    with torch.no_grad():
        network.first.bias[0] = float("nan")
    with pytest.raises(ConfigError, match=r"not finite for 4 of 4 images; evaluate another"):
        embed(network, batches(4))
    with pytest.raises(ConfigError, match="not finite"):
        embed(network, attacked(network, batches(4), ATTACK, 0))
    assert network.training, "the mode comes back after an error"


def test_parts_are_joined_and_taken_in_order() -> None:
    part = Embedded(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.arange(3))
    both = Embedded.joined(part, part.subset(np.array([2, 0])))
    assert both.labels.tolist() == [0, 1, 2, 2, 0]
    np.testing.assert_array_equal(both.embeddings[3], part.embeddings[2])


def test_unit_rows_keep_zeros() -> None:
    np.testing.assert_allclose(unit_rows(np.array([[3, 4], [0, 0]], np.float32)), [[0.6, 0.8], [0, 0]])
