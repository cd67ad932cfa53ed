"""The embedding of networks of others: the input of the linear layer that ran last, or a named layer's output."""

import copy
import logging
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tla_service.errors import ConfigError
from tla_service.models import Architecture, ImageClassifier
from tla_service.models.frozen import FrozenTwin
from tla_service.models.wrapped import noise, take_embedding, wrap

SHAPE = (3, 8, 8)


class Convolutional(nn.Module):
    """What the tests change one thing of."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Linear(6, classes)  # registered first, runs last
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.gate = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)

    def features(self, images: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(images)))

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.features(images).mean((2, 3))
        return self.head(pooled * self.gate(pooled))


def wrapped(network: nn.Module, embedding: str | None = None, classes: int = 5) -> ImageClassifier:
    made = wrap("mine:build", network, nn.Identity(), classes, SHAPE, embedding)
    if embedding is not None:
        take_embedding(made, embedding, SHAPE)
    return made


def test_the_last_linear_layer_that_runs_is_the_head() -> None:
    original = Convolutional()
    made = wrapped(copy.deepcopy(original))
    assert made.found == "input of head, 6 numbers"
    assert all(module.training for module in made.modules())
    images = torch.rand(4, *SHAPE)
    pooled = original.eval().features(images).mean((2, 3))
    output = made.eval()(images)
    assert torch.equal(output.embeddings, pooled * original.gate(pooled))
    assert torch.equal(output.logits, original(images))
    assert made.published_names()["fc.weight"] == "head.weight"
    assert made.published_names()["body.conv.weight"] == "conv.weight"


def test_tokens_are_averaged_before_the_head_or_after_it() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images.flatten(2).transpose(1, 2)).mean(1)

    original = Tokens()
    made = wrapped(copy.deepcopy(original)).eval()
    images = torch.rand(4, *SHAPE)
    torch.testing.assert_close(made(images).embeddings, images.mean((2, 3)))
    torch.testing.assert_close(made(images).logits, original(images))


class Scaled(Convolutional):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class Shared(Convolutional):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.head(images.mean((2, 3)).repeat(1, 2)).repeat(1, 2)[:, :6])


class Asking(Convolutional):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[:, :, :, : self.head.in_features])


class Functional(Convolutional):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.linear(self.features(images).mean((2, 3)), self.head.weight)


class Hidden(Scaled):
    """Its head of zeros hides that the logits are not the head's output."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


class Learned(Convolutional):
    """Its scale is 1 before it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * super().forward(images)


class Normed(Convolutional):
    """New running statistics change nothing, either."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(self.head.out_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(super().forward(images))


@pytest.mark.parametrize("make", [Scaled, Shared, Asking, Functional, Hidden, Learned, Normed])
def test_where_logits_are_not_a_linear_layers_output_the_layers_are_listed(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ConfigError, match=r"has no penultimate embedding; set model.embedding to a layer, such as "
    ) as caught:
        wrapped(make())
    network = make()
    before = copy.deepcopy(network).eval()
    layer = "relu" if make is not Shared else "head"
    assert layer in str(caught.value)
    made = wrapped(network, layer).eval()
    images = torch.rand(4, *SHAPE)
    assert torch.equal(made(images).logits, before(images))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("conv", lambda n, x: n.conv(x).mean((2, 3))),
        # The ReLU after it works in place.
        ("norm", lambda n, x: n.norm(n.conv(x)).mean((2, 3))),
        ("relu", lambda n, x: n.features(x).mean((2, 3))),
        ("gate", lambda n, x: n.gate(n.features(x).mean((2, 3)))),
        ("head", lambda n, x: n(x)),
    ],
)
def test_a_named_layer(layer: str, expected: Callable[[nn.Module, Tensor], Tensor]) -> None:
    original = Convolutional().eval()
    made = wrapped(copy.deepcopy(original), layer)
    images = torch.rand(4, *SHAPE)
    size = 5 if layer == "head" else 6
    assert made.embedding_size == size
    assert made.found == f"output of {layer}, {size} numbers"
    assert made.training
    made.eval()
    twin = FrozenTwin(made)
    for network in (made, copy.deepcopy(made), twin, torch.compile(made, backend="eager")):
        output = network(images)
        torch.testing.assert_close(output.embeddings, expected(original, images))
        torch.testing.assert_close(output.logits, original(images))
    output.embeddings.sum().backward()
    assert made.body.conv.weight.grad is not None  # type: ignore[union-attr]
    if layer in ("relu", "gate", "head"):
        assert len(twin._folds) == 1


def test_tokens_and_layers_of_this_packages_networks() -> None:
    made = Architecture("torchvision:vit_b_16", "none", "encoder")
    with torch.device("meta"):
        assert made.build(10, (3, 32, 32))(torch.rand(2, 3, 32, 32)).embeddings.shape == (2, 768)
    own = Architecture("small_cnn", embedding="convolutions.2").build(10, (1, 8, 8))
    assert own(torch.rand(2, 1, 8, 8)).embeddings.shape == (2, 32)
    squeezed = Architecture("torchvision:squeezenet1_1", embedding="features").build(10, (3, 64, 64))
    assert squeezed(torch.rand(2, 3, 64, 64)).embeddings.shape == (2, 512)


def test_an_unknown_layer_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"model.embedding=layer4: .*choose conv \(6x6x6\), norm \(6x6x6\), relu"
    ) as caught:
        wrapped(Convolutional(), "layer4")
    assert "\n" not in str(caught.value)


def test_threads_get_their_own_embeddings() -> None:
    made = wrapped(Convolutional(), "relu").eval()
    images = torch.rand(8, *SHAPE)
    expected = made(images).embeddings
    wrong = []

    def ask(row: int) -> None:
        for _ in range(200):
            with torch.no_grad():
                found = made(images[row : row + 1]).embeddings
            if not torch.allclose(found, expected[row : row + 1], atol=1e-6):
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Pair(Convolutional):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(images), images


class Classes(Convolutional):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).argmax(1)


class Integers(Convolutional):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).round().long()


class Small(Convolutional):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(images[:, :, :1, :2].flatten(1) if images.shape[2] == 2 else images)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Pair, "the network returns tuple; return one tensor of logits"),
        (Classes, r"it maps 2 images of 5 classes to a tensor of shape \(2,\)"),
        (lambda: Convolutional(4), r"it maps 2 images of 5 classes to a tensor of shape \(2, 4\)"),
        (Integers, "the network returns int64 numbers"),
        (Small, r"fails on 3x8x8 images \(RuntimeError: .*; correct its forward method"),
    ],
)
def test_what_returns_no_logits_is_refused(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name=mine:build: {reason}"):
        wrapped(make())


class Standardized(nn.Conv2d):
    """Its weights are standardized, so a BatchNorm's scale must not be multiplied in."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


class Weighted(Convolutional):
    """Uses the convolution's weight elsewhere too."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.conv.weight.sum()


class Branching(Convolutional):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.mean() > 0 else -images)


def with_conv(conv: nn.Module) -> nn.Module:
    network = Convolutional()
    network.conv = conv  # type: ignore[assignment]
    return network


@pytest.mark.parametrize("name", ["standardized", "spectral", "weighted", "branching"])
def test_what_cannot_be_folded_is_attacked_unfolded(name: str, caplog: pytest.LogCaptureFixture) -> None:
    network = {
        "standardized": lambda: with_conv(Standardized(3, 6, 3)),
        "spectral": lambda: with_conv(spectral_norm(nn.Conv2d(3, 6, 3))),
        "weighted": Weighted,
        "branching": Branching,
    }[name]()
    with caplog.at_level(logging.WARNING):
        made = wrap("mine:build", network, nn.Identity(), 5, SHAPE, "relu").eval()
        take_embedding(made, "relu", SHAPE)
        made.body.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
        made.body.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
        twin = FrozenTwin(made)
    images = torch.rand(4, *SHAPE)
    torch.testing.assert_close(twin(images).logits, made(images).logits)
    assert not twin._folds
    said = {"weighted": "its outputs would differ by", "branching": "the network cannot be traced"}
    if name in said:
        assert f"BatchNorm is not folded into convolutions, so attacks take longer: {said[name]}" in caplog.text


def test_the_noise_is_the_same_everywhere_and_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    images = noise((1, 2, 2))
    assert images[0].flatten().tolist() == pytest.approx([0.618034, 0.236068, 0.854102, 0.472136], abs=1e-6)
    assert torch.equal(torch.random.get_rng_state(), before)
