"""The moving average against torch's own."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tla_service.models import build_model
from tla_service.training.average import WeightAverage


def moved(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    network(torch.rand(8, 1, 8, 8))  # moves BatchNorm's statistics


def test_it_averages_as_torch_does_and_copies_integers() -> None:
    network = build_model("mnist_cnn", 4, (1, 8, 8)).train()
    ours = WeightAverage(network, 0.9)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        moved(network)
        ours.update_parameters(network)
        theirs.update_parameters(network)
    expected, current = theirs.state_dict(), network.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        integers = name.endswith("num_batches_tracked")
        assert torch.equal(value, current[name.removeprefix("module.")] if integers else expected[name]), name


def test_a_loaded_average_goes_on_from_there() -> None:
    network = build_model("digits_cnn", 4, (1, 8, 8))
    first = WeightAverage(network, 0.9)
    moved(network)
    first.update_parameters(network)
    second = WeightAverage(network, 0.9)
    second.load_state_dict(first.state_dict())
    moved(network)
    for average in (first, second):
        average.update_parameters(network)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert int(second.n_averaged) == 2
