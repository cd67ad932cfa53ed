"""The frozen twin is the network in eval mode: the same function, now and after every update, and no more."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tla_service.models import Architecture, ModelOutput, build_model
from tla_service.models.classifier import AtLayer, PerImageStandardization
from tla_service.models.frozen import FrozenTwin, use_matrix_products
from tla_service.models.resnets import MadryWideResNet, WideResNet


def lived_in(network: nn.Module, images: Tensor) -> nn.Module:
    """In float64 and train mode, with statistics, scales and shifts that are not the initial ones."""
    network = network.double().train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    for _ in range(2):
        network(images)
    return network


NETWORKS: dict[str, tuple[Any, tuple[int, int, int], int]] = {
    "mnist_cnn": (lambda: build_model("mnist_cnn", 5, (1, 8, 8)), (1, 8, 8), 4),
    "mnist_cnn at a layer": (lambda: AtLayer(build_model("mnist_cnn", 5, (1, 8, 8)), "middle"), (1, 8, 8), 4),
    "preact_resnet_18": (lambda: build_model("preact_resnet_18", 5, (3, 8, 8)), (3, 8, 8), 8),
    "madry": (
        lambda: MadryWideResNet(8, 1, num_classes=5, in_channels=3, normalization=PerImageStandardization()),
        (3, 8, 8),
        4,  # three second BatchNorms, and the first behind the stem
    ),
    "wide": (lambda: WideResNet(10, 1, num_classes=5, in_channels=3, normalization=nn.Identity()), (3, 8, 8), 3),
    "preact_resnet_18 with SiLU": (
        lambda: Architecture("preact_resnet_18", activation="silu").build(5, (3, 8, 8)),
        (3, 8, 8),
        8,
    ),
    "tiny": (lambda: build_model("tiny_resnet20_stride1", 5, (3, 16, 16)), (3, 16, 16), 1),
    "torchvision": (lambda: build_model("torchvision:resnet18", 5, (3, 32, 32)), (3, 32, 32), 20),
    "no BatchNorm": (lambda: build_model("digits_cnn", 5, (1, 8, 8)), (1, 8, 8), 0),
}


def outputs(network: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, embeddings, and a gradient to the images."""
    images = images.clone().requires_grad_()
    output: ModelOutput = network(images)
    (gradient,) = torch.autograd.grad(output.logits.square().sum(), images)
    return output.logits.detach(), output.embeddings.detach(), gradient


def compare(twins: list[FrozenTwin], network: nn.Module, images: Tensor) -> None:
    expected = outputs(network.eval(), images)
    for twin in twins:
        for found, values in zip(outputs(twin, images), expected, strict=True):
            torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-9 * float(values.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_twin_is_the_network_in_eval_mode_before_and_after_updates(name: str) -> None:
    build, shape, folds = NETWORKS[name]
    images = torch.rand(4, *shape, dtype=torch.float64)
    network = lived_in(build(), images)
    plain, folded = twins = [FrozenTwin(network, fold_batchnorm=fold) for fold in (False, True)]
    assert len(folded._folds) >= folds
    assert len(plain._folds) == 0
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for _ in range(2):
        compare(twins, network, images)
        network.train()
        optimizer.zero_grad()
        network(images).logits.square().mean().backward()
        optimizer.step()
        for twin in twins:
            twin.refresh()
    other = lived_in(build(), images)
    network.load_state_dict(other.state_dict())
    for twin in twins:
        twin.refresh()
    compare(twins, other, images)


def test_a_twin_that_was_not_refreshed_is_behind() -> None:
    """What makes the test above able to fail."""
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    network = lived_in(build_model("mnist_cnn", 5, (1, 8, 8)), images)
    twin = FrozenTwin(network)
    with torch.no_grad():
        network.body[1].running_mean += 1  # type: ignore[index, operator, union-attr]
    assert not torch.allclose(outputs(twin, images)[0], outputs(network.eval(), images)[0])


def test_the_network_keeps_its_mode_gradients_and_statistics() -> None:
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    network = lived_in(build_model("preact_resnet_18", 5, (3, 8, 8)), images)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    twin = FrozenTwin(network)
    outputs(twin, images)
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in twin.module.parameters())


def test_only_folded_weights_are_copies() -> None:
    network = build_model("mnist_cnn", 5, (1, 8, 8))
    own = {parameter.data_ptr() for parameter in network.parameters()}
    copies = [value for value in FrozenTwin(network).module.parameters() if value.data_ptr() not in own]
    assert len(copies) == 2 * 4  # weight and bias of the four convolutions


class ValueDependent(nn.Module):
    """A network that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> ModelOutput:
        features = self.norm(self.convolution(images))
        rows = features.mean((2, 3)) if features.sum() > 0 else features.amax((2, 3))
        return ModelOutput(rows, rows)


def test_a_network_that_cannot_be_traced_is_left_as_it_is() -> None:
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    network = lived_in(ValueDependent(), images)
    twin = FrozenTwin(network)
    assert len(twin._folds) == 0
    assert torch.equal(twin(images).logits, network.eval()(images).logits)


def test_what_is_computed_of_a_buffer_follows_it() -> None:
    class Scaled(ValueDependent):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("variance", torch.ones(1))

        def forward(self, images: Tensor) -> ModelOutput:
            rows = (self.norm(self.convolution(images)) / self.variance.sqrt()).mean((2, 3))
            return ModelOutput(rows, rows)

    images = torch.rand(4, 1, 8, 8)
    network = Scaled().eval()
    twin = FrozenTwin(network)
    assert len(twin._folds) == 1
    network.variance.fill_(4)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(twin(images).logits, network(images).logits)


def test_a_convolution_with_a_second_reader_is_not_folded() -> None:
    class Shared(ValueDependent):
        def forward(self, images: Tensor) -> ModelOutput:
            features = self.convolution(images)
            rows = (self.norm(features) + features).mean((2, 3))
            return ModelOutput(rows, rows)

    images = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    network = lived_in(Shared(), images)
    twin = FrozenTwin(network)
    assert len(twin._folds) == 0
    assert torch.equal(twin(images).logits, network.eval()(images).logits)


@pytest.mark.parametrize("fold", [False, True])
def test_weights_kept_in_bfloat16_change_nothing_under_autocast(fold: bool) -> None:
    torch.manual_seed(0)
    network = build_model("mnist_cnn", 4, (1, 8, 8)).train()
    network(torch.rand(16, 1, 8, 8))
    images = torch.rand(4, 1, 8, 8)
    plain, narrow = (FrozenTwin(network, fold_batchnorm=fold, weights_dtype=dtype) for dtype in (None, torch.bfloat16))
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert torch.equal(narrow(images).logits, plain(images).logits)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        plain.refresh()
        narrow.refresh()
    kept = {parameter.dtype for name, parameter in narrow.module.named_parameters() if parameter.dim() > 1}
    assert kept == {torch.bfloat16}


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding"), [(1, 3, 1, 1), (3, 4, 2, 1), (2, (3, 5), (2, 1), (0, 2))]
)
def test_matrix_products_give_the_gradient_to_the_images(channels: int, kernel: Any, stride: Any, padding: Any) -> None:
    images = torch.rand(4, channels, 9, 10, dtype=torch.float64, requires_grad=True)
    plain = nn.Conv2d(channels, 6, kernel, stride, padding).double().requires_grad_(requires_grad=False)
    fast = copy.deepcopy(plain)
    use_matrix_products(fast)
    assert type(fast) is not nn.Conv2d
    for output in (plain(images), fast(images)):
        gradients = [torch.autograd.grad(output.square().sum(), images, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*gradients)
    expected, found = (torch.autograd.grad(network(images).square().sum(), images)[0] for network in (plain, fast))
    torch.testing.assert_close(found, expected)


def test_convolutions_that_are_something_else_keep_their_gradients() -> None:
    class Own(nn.Conv2d):
        pass

    kept = [
        nn.Conv2d(8, 4, 3),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv2d(2, 4, 3, dilation=2),
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        Own(2, 4, 3),
    ]
    network = nn.Sequential(*kept)
    kinds = [type(module) for module in network]
    use_matrix_products(network)
    assert [type(module) for module in network] == kinds
