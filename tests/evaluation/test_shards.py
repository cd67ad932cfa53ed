"""Evaluation computes in float32, whatever training has switched on."""

import torch

from tla_service.evaluation.shards import float32


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
