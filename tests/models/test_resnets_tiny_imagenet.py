import pytest
import torch

from tla_service.models import build_model


def _bottleneck_count() -> int:
    count, channels = 0, 64
    for width, blocks in zip((64, 128, 256, 512), (2, 3, 5, 2), strict=True):
        for index in range(blocks):
            count += channels * width + 9 * width * width + width * 4 * width
            count += 2 * channels + 2 * width + 2 * width
            count += channels * 4 * width if index == 0 else 0
            channels = 4 * width
    return count


def _basic_count() -> int:
    pairs = ((64, 64), (64, 128), (128, 256), (256, 512))
    return sum(9 * i * o + 9 * o * o + 2 * i + 2 * o + i * o for i, o in pairs)


_STEM = 49 * 3 * 64 + 2 * 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny_resnet50_stride2", _STEM + _bottleneck_count() + 2 * 2048 + 2048 * 200 + 200),
        ("tiny_resnet50_stride1", _STEM + _bottleneck_count() + 2 * 2048 + 2048 * 200 + 200),
        ("tiny_resnet20_stride1", _STEM + _basic_count() + 2 * 512 + 512 * 200 + 200),
    ],
)
def test_parameter_count(name: str, expected: int) -> None:
    with torch.device("meta"):
        network = build_model(name, 200, (3, 64, 64))
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
