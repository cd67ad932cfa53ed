import torch

from tla_service.models import build_model


def test_published_layout() -> None:
    with torch.device("meta"):
        network = build_model("preact_resnet_18", 10, (3, 32, 32))
    assert network.classifier is network.linear
    assert {"layer2.0.shortcut.0.weight", "linear.bias", "bn.weight"} <= set(network.state_dict())
    assert "layer1.0.shortcut.0.weight" not in network.state_dict()


def test_parameter_count() -> None:
    with torch.device("meta"):
        network = build_model("preact_resnet_18", 10, (3, 32, 32))
    expected = 9 * 3 * 64 + 2 * 512 + 512 * 10 + 10
    for narrow, wide in ((64, 64), (64, 128), (128, 256), (256, 512)):
        expected += 9 * narrow * wide + 3 * 9 * wide * wide  # four 3x3 convolutions a group
        expected += 2 * narrow + 3 * 2 * wide  # and the four BatchNorms before them
        expected += narrow * wide if narrow != wide else 0
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
