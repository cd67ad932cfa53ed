"""The moving average of the weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """Exponential moving average of a network's weights and buffers.

    As torch's, with the same state dict, but integer buffers (BatchNorm's count of batches) are copied, not averaged
    one by one, and the count of updates stays on the CPU: an update never waits for the device.

    Args:
        network: The network; it must stay on its device.
        decay: Share of the average that an update keeps, in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, use_buffers=True)
        self._decay = decay
        ours, theirs = ([*each.parameters(), *each.buffers()] for each in (self.module, network))
        pairs = list(zip(ours, theirs, strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._integers = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:  # noqa: ARG002 - torch's signature
        """Move the average towards the network's current weights; the first update copies them."""
        average, current = zip(*self._floats, strict=True)
        if self.n_averaged > 0:
            torch._foreach_lerp_(average, current, 1 - self._decay)
        else:
            torch._foreach_copy_(average, current)
        for ours, theirs in self._integers:
            ours.copy_(theirs)
        self.n_averaged += 1
