"""Evaluation computes in float32 and without gradients to parameters, whatever training has switched on."""

import torch
from torch import nn

from tla_service.evaluation.shards import evaluating, float32


def test_fast_modes_are_off_meanwhile_and_on_again_afterwards() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.benchmark = cudnn.allow_tf32 = matmul.allow_tf32 = True
        with torch.autocast("cpu", dtype=torch.bfloat16), float32(torch.device("cpu")):
            assert not any((cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32))
            assert (torch.rand(2, 2) @ torch.rand(2, 2)).dtype == torch.float32
        assert cudnn.benchmark
        assert cudnn.allow_tf32
        assert matmul.allow_tf32
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_parameters_get_no_gradient_meanwhile_and_want_theirs_again_afterwards() -> None:
    network, images = nn.Linear(3, 2), torch.rand(4, 3, requires_grad=True)
    network.bias.requires_grad_(requires_grad=False)
    with evaluating(network):
        assert not network.training
        network(images).sum().backward()
    assert images.grad is not None
    assert network.weight.grad is None
    assert (network.training, network.weight.requires_grad, network.bias.requires_grad) == (True, True, False)
