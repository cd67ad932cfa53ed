import pytest
import torch
from torch import nn

from tla_service.models import build_model


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("digits_cnn", (1, 8, 8), (9 * 1 + 1) * 32 + (9 * 32 + 1) * 64 + (64 * 4 * 4 + 1) * 128 + (128 + 1) * 10),
        ("small_cnn", (1, 28, 28), (16 * 1 + 1) * 16 + (16 * 16 + 1) * 32 + (32 * 7 * 7 + 1) * 128 + (128 + 1) * 10),
        ("cifar_cnn", (3, 32, 32), 16 * (3 * 32 + 32 * 64 + 64 * 128) + 224 + (128 * 4 * 4 + 1) * 128 + (128 + 1) * 10),
        ("small_cnn", (3, 32, 32), (16 * 3 + 1) * 16 + (16 * 16 + 1) * 32 + (32 * 8 * 8 + 1) * 128 + (128 + 1) * 10),
    ],
)
def test_parameter_count(name: str, shape: tuple[int, int, int], expected: int) -> None:
    network = build_model(name, 10, shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(("name", "shape"), [("digits_cnn", (1, 8, 8)), ("small_cnn", (1, 28, 28))])
def test_training_mode_keeps_images_apart(name: str, shape: tuple[int, int, int]) -> None:
    """Without BatchNorm the mean gradient over shards is the gradient of the whole batch."""
    network = build_model(name, 10, shape).double()
    images, labels = torch.rand(4, *shape, dtype=torch.float64), torch.tensor([0, 3, 5, 9])

    def gradient(rows: slice) -> torch.Tensor:
        loss = nn.functional.cross_entropy(network(images[rows]).logits, labels[rows])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    whole = gradient(slice(0, 4))
    shards = (gradient(slice(0, 2)) + gradient(slice(2, 4))) / 2
    torch.testing.assert_close(shards, whole, rtol=1e-9, atol=1e-14)
    assert not list(network.buffers())


@pytest.mark.parametrize(("name", "shape"), [("small_cnn", (1, 28, 28)), ("cifar_cnn", (3, 32, 32))])
def test_the_fast_gradient_to_images_is_that_of_the_convolution(name: str, shape: tuple[int, int, int]) -> None:
    network = build_model(name, 10, shape).double()
    images, labels = torch.rand(4, *shape, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 5, 9])
    wanted = [images, *network.parameters()]

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(nn.functional.cross_entropy(network(images).logits, labels), wanted))

    fast = gradients()
    network.convolutions[0].__class__ = nn.Conv2d
    for mine, plain in zip(fast, gradients(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-14)


def test_the_fast_gradient_under_autocast_and_twice() -> None:
    network = build_model("small_cnn", 10, (1, 28, 28))
    images = torch.rand(4, 1, 28, 28, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total = network(images).logits.float().sum()
    assert torch.autograd.grad(total, images)[0].dtype == torch.float32
    (gradient,) = torch.autograd.grad(network(images).logits.sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # never a gradient without the weights' share
