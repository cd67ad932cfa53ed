import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from tla_service.models import build_model
from tla_service.models.resnets import MadryWideResNet, WideResNet


def test_madry_initial_weights() -> None:
    network = MadryWideResNet(8, 4, num_classes=100, in_channels=3, normalization=nn.Identity())
    widening = network.get_submodule("blocks.2.conv1")  # 128 to 256: outputs, not inputs, set the scale
    assert isinstance(widening, nn.Conv2d)
    assert widening.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    bound = math.sqrt(3 / 256)
    assert network.fc.weight.abs().max().item() == pytest.approx(bound, rel=0.001)
    assert network.fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not network.fc.bias.any()


def test_standard_state_dict_has_the_published_layout() -> None:
    network = WideResNet(10, 1, num_classes=5, in_channels=3, normalization=nn.Identity())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{part}" for part in norm}
    for block in ("block1.layer.0", "block2.layer.0", "block3.layer.0"):
        expected |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
        expected |= {f"{block}.{bn}.{part}" for bn in ("bn1", "bn2") for part in norm}
    # With width 1 the first group stays at 16 channels and needs no projection.
    expected |= {"block2.layer.0.convShortcut.weight", "block3.layer.0.convShortcut.weight"}
    assert set(network.state_dict()) == expected


def _blocks(widths: tuple[int, ...], per_group: int) -> int:
    """Two 3x3 convolutions and two BatchNorms a block."""
    count = 0
    for narrow, wide in pairwise(widths):
        count += 9 * narrow * wide + 9 * wide * wide + 2 * narrow + 2 * wide
        count += (per_group - 1) * (2 * 9 * wide * wide + 4 * wide)
    return count


_WIDTHS = (16, 160, 320, 640)
_ENDS = 9 * 3 * 16 + 2 * 640 + 640 * 10 + 10
_PROJECTIONS = 16 * 160 + 160 * 320 + 320 * 640


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrn_32_10", _ENDS + _blocks(_WIDTHS, 5)),
        ("wrn_28_10", _ENDS + _blocks(_WIDTHS, 4) + _PROJECTIONS),
        ("wrn_34_10", _ENDS + _blocks(_WIDTHS, 5) + _PROJECTIONS),
    ],
)
def test_parameter_count(name: str, expected: int) -> None:
    with torch.device("meta"):
        network = build_model(name, 10, (3, 32, 32))
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
