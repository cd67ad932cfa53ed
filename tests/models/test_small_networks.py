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
