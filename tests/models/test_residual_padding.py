import pytest
import torch

from tla_service.models.residual import SameConv2d, SameMaxPool2d, same_padding


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "expected"),
    [
        (32, 3, 2, (0, 1)),
        (64, 7, 2, (2, 3)),
        (5, 3, 2, (1, 1)),
        (8, 3, 1, (1, 1)),
        (8, 7, 1, (3, 3)),
        (8, 1, 2, (0, 0)),
    ],
)
def test_padding_by_hand(size: int, kernel_size: int, stride: int, expected: tuple[int, int]) -> None:
    assert same_padding(size, kernel_size, stride) == expected


def _row(values: list[float]) -> torch.Tensor:
    """The values along the width, repeated down a height of one."""
    return torch.tensor(values).view(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("stride", "values", "expected"),
    [
        (2, [1.0, 2.0, 3.0, 4.0], [6.0, 7.0]),  # torch's padding=1 would give 3 and 9
        (2, [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 9.0, 9.0]),
        (1, [1.0, 2.0, 3.0, 4.0], [3.0, 6.0, 9.0, 7.0]),
    ],
)
def test_convolution_by_hand(stride: int, values: list[float], expected: list[float]) -> None:
    convolution = SameConv2d(1, 1, 3, stride)
    torch.nn.init.ones_(convolution.weight)
    assert convolution.bias is None
    assert convolution(_row(values)).flatten().tolist() == expected


def test_max_pool_by_hand_never_picks_padding() -> None:
    pooled = SameMaxPool2d(3, 2)(_row([-1.0, -2.0, -4.0, -3.0]))
    assert pooled.flatten().tolist() == [-1.0, -3.0]
