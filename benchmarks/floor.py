"""The theoretical cost of a step, and the matrix multiplication rate of the device."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Spread, take_turns
from benchmarks.workloads import CLASSES, Workload
from tla_service.models import build_model
from tla_service.models.frozen import FrozenTwin
from tla_service.runtime import WorkerContext, autocast


class Floor:
    """K forward and input-backward passes and one forward and backward pass; nothing else.

    No data, random start, sign, projection, mining or optimizer; plain eager layers, BatchNorm not folded.

    Args:
        workload: Network, batch and K.
        context: Where.
        precision: As `training.precision`.
        channels_last: As `training.channels_last`.
        with_clean: The forward and backward pass has as many clean images as adversarial ones, as TLA's has.
    """

    def __init__(
        self,
        workload: Workload,
        context: WorkerContext,
        *,
        precision: str = "float32",
        channels_last: bool = False,
        with_clean: bool = False,
    ) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        network = build_model(workload.model, CLASSES, workload.image_shape)
        self.network: nn.Module = network.to(context.device, memory_format=layout)  # type: ignore[call-overload]
        self.twin = FrozenTwin(self.network, fold_batchnorm=False)
        self.images = torch.rand(workload.batch_size, *workload.image_shape, device=context.device)
        self.labels = torch.arange(workload.batch_size, device=context.device) % CLASSES
        copies = 2 if with_clean else 1
        self.all_images, self.all_labels = self.images.repeat(copies, 1, 1, 1), self.labels.repeat(copies)
        self.num_steps, self.precision, self.device = workload.num_steps, precision, context.device

    def __call__(self) -> None:
        """One batch."""
        for _ in range(self.num_steps):
            images = self.images.requires_grad_()
            with autocast(self.precision, self.device):
                logits = self.twin(images).logits
            torch.autograd.grad(F.cross_entropy(logits.float(), self.labels), images)
        self.network.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device):
            logits = self.network(self.all_images.detach()).logits
        F.cross_entropy(logits.float(), self.all_labels).backward()

    def flops(self) -> int:
        """Floating-point operations of one batch's matrix products and convolutions (a multiply-add is two).

        Counted in a forward pass; a gradient to the input, or to the weights, is taken as one more.
        """
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.twin(self.images)
        copies = len(self.all_images) // len(self.images)
        return int(counter.get_total_flops()) * (2 * self.num_steps + 3 * copies)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> Spread:
    """FLOP/s of one large matrix product on the device, a practical upper bound; with TF32, as convolutions have it."""
    size = 8192 if device.type == "cuda" else 1024
    first, second = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        seconds = take_turns({"product": lambda: first @ second}, rounds=8, burn_in=3, repeats=4).wall["product"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Spread.of([2 * size**3 / value for value in seconds])
