"""Our attacks against torchattacks, an independent library, on one trained network."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tla_service.attacks import Attack, attack_images, craft
from tla_service.config import DataConfig
from tla_service.data import load_dataset
from tla_service.models import build_model

torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed (pip install torchattacks)")

EPSILON, STEP, STEPS = 0.15, 0.02, 15
IMAGES = 300


class Logits(nn.Module):
    """What the library expects: a module that returns logits, all above zero.

    A shift of all logits changes neither loss. The library's margin takes the true class for a logit of zero, so it
    is right only when all others are above.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images).logits
        return logits + 100


@pytest.fixture(scope="module")
def trained() -> tuple[Logits, Tensor, Tensor]:
    """A digits network after a little adversarial training, and test images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = load_dataset(DataConfig(name="digits"))
        network = build_model("digits_cnn", 10, (1, 8, 8))
        images, labels = data.train.fetch(torch.arange(len(data.train))).float() / 255, data.train.labels
        optimizer = torch.optim.Adam(network.parameters(), 0.005)
        attack = Attack(kind="pgd", epsilon=EPSILON, step_size=0.08, num_steps=2)
        for epoch in range(6):
            for batch in torch.randperm(len(labels)).split(128):
                pixels = images[batch]
                if epoch > 1:
                    pixels = craft(lambda x: network(x).logits, pixels, labels[batch], attack)
                optimizer.zero_grad()
                F.cross_entropy(network(pixels).logits, labels[batch]).backward()
                optimizer.step()
    test = torch.arange(IMAGES)
    return Logits(network.eval()), data.test.fetch(test).float() / 255, data.test.labels[test]


def accuracy(network: Logits, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).double().mean())


def assert_equal_within_noise(ours: float, theirs: float) -> None:
    """Within 1.96 standard errors of the binomial share, on the same images."""
    assert 0.1 < theirs < 0.95, "the attack must do something, and not everything, for this to tell"
    assert abs(ours - theirs) <= 1.96 * math.sqrt(theirs * (1 - theirs) / IMAGES)


def test_fgsm_is_the_same_to_the_last_bit(trained: tuple[Logits, Tensor, Tensor]) -> None:
    network, images, labels = trained
    theirs = torchattacks.FGSM(network, eps=EPSILON)(images, labels)
    ours = craft(network, images, labels, Attack(kind="fgsm", epsilon=EPSILON))
    assert torch.equal(ours, theirs)
    assert accuracy(network, ours, labels) < accuracy(network, images, labels) - 0.1


def test_bim_is_the_same_to_the_last_bit(trained: tuple[Logits, Tensor, Tensor]) -> None:
    network, images, labels = trained
    theirs = torchattacks.BIM(network, eps=EPSILON, alpha=STEP, steps=STEPS)(images, labels)
    ours = craft(network, images, labels, Attack(kind="bim", epsilon=EPSILON, step_size=STEP, num_steps=STEPS))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "norm"),
    [("pgd", "linf"), ("mim", "linf"), ("cw", "linf"), ("pgd", "l2")],
    ids=["pgd", "mim", "cw", "pgd-l2"],
)
def test_robust_accuracy_is_the_same(trained: tuple[Logits, Tensor, Tensor], kind: str, norm: str) -> None:
    network, images, labels = trained
    epsilon, step = (EPSILON, STEP) if norm == "linf" else (0.6, 0.1)
    settings = {"eps": epsilon, "alpha": step, "steps": STEPS}
    library = (
        {
            "pgd": lambda: torchattacks.PGD(network, **settings),
            "mim": lambda: torchattacks.MIFGSM(network, **settings, decay=1.0),
            # Without momentum this is projected ascent of the logit margin.
            "cw": lambda: torchattacks.UPGD(network, **settings, loss="margin", decay=0.0, random_start=True),
        }[kind]
        if norm == "linf"
        else lambda: torchattacks.PGDL2(network, **settings)
    )
    torch.manual_seed(0)
    theirs = library()(images, labels)
    attack = Attack(
        kind=kind,  # type: ignore[arg-type]
        norm=norm,  # type: ignore[arg-type]
        epsilon=epsilon,
        step_size=step,
        num_steps=STEPS,
        random_start=kind != "mim",
    )
    robust = attack_images(network, images, labels, attack, torch.Generator().manual_seed(0)).robust
    assert_equal_within_noise(float(robust.double().mean()), accuracy(network, theirs, labels))
