"""What is checked of networks from outside the package before a run: one sentence for each mistake."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from tests.models.test_own_code import OWN
from tests.training.conftest import digits_config
from tla_service.config import RunConfig
from tla_service.data import load_dataset
from tla_service.errors import ConfigError
from tla_service.models import Architecture
from tla_service.models.wrapped import take_embedding, wrap
from tla_service.training.network import check_network
from tla_service.training.pretrained import find_pretrained

SHAPE = (1, 8, 8)
CONFIG = digits_config(model={"name": "network:build", "code": str(OWN)})
DATASET = load_dataset(CONFIG.data)


class Good(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.dropout(self.norm(self.conv(images)).relu().mean((2, 3))))


def check(network: nn.Module, embedding: str | None = None, config: RunConfig = CONFIG) -> None:
    made = wrap("network:build", network, nn.Identity(), 10, SHAPE, embedding)
    if embedding is not None:
        take_embedding(made, embedding, SHAPE)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    state = torch.random.get_rng_state()
    try:
        check_network(config, Architecture.of(config.model), made, DATASET)
    finally:
        assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
        assert torch.equal(torch.random.get_rng_state(), state)
        assert made.training
        assert all(parameter.grad is None for parameter in made.parameters())


def test_good_networks_pass() -> None:
    check(Good())
    check(Good(), "conv")
    zero = Good()
    nn.init.zeros_(zero.head.weight)
    check(zero)  # torchvision's ViT begins like this
    with_own = Architecture.of(CONFIG.model).build(10, SHAPE)
    check_network(CONFIG, Architecture.of(CONFIG.model), with_own, DATASET)


def test_published_weights_fit_a_network_without_a_linear_head(tmp_path: Path) -> None:
    model = {"name": "torchvision:squeezenet1_1", "embedding": "features", "normalization": "none"}
    config = digits_config(model=model | {"pretrained": str(tmp_path / "w.pt")})
    network = Architecture.of(config.model).build(10, (3, 32, 32))
    published = models.squeezenet1_1(num_classes=10)
    torch.save(published.state_dict(), tmp_path / "w.pt")
    network.load_state_dict(find_pretrained(config, network).state_dict)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(network.eval()(images).logits, published.eval()(images))
    torch.save(models.resnet18(num_classes=10).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"^model\.pretrained=.*does not match this network|contains none of"):
        find_pretrained(config, network)


class Viewed(Good):
    def forward(self, images: Tensor) -> Any:
        return self.head(self.norm(self.conv(images)).relu().view(len(images), -1)[:, ::36])


def test_networks_are_checked_in_the_memory_format_that_is_asked_for() -> None:
    check(Viewed())
    config = digits_config(model=CONFIG.model.model_dump(), training={"channels_last": True})
    with pytest.raises(
        ConfigError, match=r"view size .*; use reshape in place of view, or leave training.channels_last"
    ):
        check(Viewed(), config=config)


class Detached(Good):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images.detach())


class WithoutGradients(Good):
    def forward(self, images: Tensor) -> Any:
        with torch.no_grad():
            features = self.norm(self.conv(images)).relu().mean((2, 3))
        return self.head(features)


class Rounded(Good):
    def forward(self, images: Tensor) -> Any:
        return super().forward((images * 255).round() / 255)


class HiddenArgmax(Good):
    def forward(self, images: Tensor) -> Any:
        return nn.functional.one_hot(super().forward(images).argmax(1), 10).float()


class RandomInEval(Good):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images + 0.1 * torch.rand_like(images))


class AlwaysDropout(Good):
    def forward(self, images: Tensor) -> Any:
        return super().forward(nn.functional.dropout(images, 0.5))


class BatchStatistics(Good):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


class InPlace(Good):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images.sub_(0.5))


class InPlaceUnseen(Good):
    def forward(self, images: Tensor) -> Any:
        images.data.mul_(0.9)
        return super().forward(images)


class BrokenGraph(Good):
    def forward(self, images: Tensor) -> Any:
        features = self.norm(self.conv(images)).exp()
        pooled = features.mean((2, 3))
        features.mul_(2)
        return self.head(pooled + features.square().mean((2, 3)))


class Probabilities(Good):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).softmax(1)


class TupleInTraining(Good):
    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (logits, images) if self.training else logits


class Unused(Good):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(3, 3)


class Double(Good):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, images: Tensor) -> Any:
        return super().forward(images.double()).float()


class Steep(Good):
    def forward(self, images: Tensor) -> Any:
        return super().forward((images - images).sqrt() + images)


class Infinite(Good):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images / 0)


@pytest.mark.parametrize(
    ("make", "embedding", "reason"),
    [
        (Detached, None, "no gradient with respect to the images, so it cannot be attacked; leave out argmax"),
        (WithoutGradients, None, "no gradient with respect to the images"),
        (Rounded, None, "no gradient with respect to the images"),
        (HiddenArgmax, "conv", "no gradient with respect to the images"),
        (RandomInEval, "conv", "returns other logits for the same images in eval mode"),
        (AlwaysDropout, "conv", "returns other logits for the same images in eval mode"),
        (BatchStatistics, None, "returns other logits for an image alone"),
        (InPlace, None, "fails under attack or in training .*in-place.*; do not change tensors in place"),
        (InPlaceUnseen, None, "changes its images in place"),
        (BrokenGraph, None, "fails under attack or in training .*inplace"),
        (Probabilities, "conv", "returns probabilities; return logits"),
        (TupleInTraining, None, "returns tuple in training mode; return one tensor of logits, in both modes"),
        (Unused, None, "its logits do not depend on auxiliary.weight and 1 more; remove parameters"),
        (Double, "conv", "conv.weight has type float64; return a network with float32 parameters"),
        (Steep, None, "the gradient with respect to the images is not finite"),
        (Infinite, "conv", "not finite in eval mode"),
    ],
)
def test_one_sentence_for_each_mistake(make: Callable[[], nn.Module], embedding: str | None, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name=network:build: .*{reason}") as caught:
        check(make(), embedding)
    assert "\n" not in str(caught.value)
