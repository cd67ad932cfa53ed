"""All steps of an attack as one CUDA graph."""

from dataclasses import replace

import torch
from torch import Tensor

from tla_service.attacks import Attack, LogitsFn, climb
from tla_service.data import Batch

_WARM_UP = 3


class GraphedClimb:
    """All steps of an attack, forward and backward, replayed as one CUDA graph for batches of the given one's shape.

    Radius and step size are tensors, so that one graph serves a radius that grows. The storage of the weights behind
    `logits_fn` must not change; a replay overwrites the tensors that it made in the last forward pass.
    """

    def __init__(self, logits_fn: LogitsFn, batch: Batch, attack: Attack) -> None:
        images, labels = batch.images, batch.labels
        self._images, self._start, self._labels = images.clone(), images.clone(), labels.clone()
        self._lengths = images.new_tensor([attack.epsilon, attack.step_size]).unbind()
        epsilon, step_size = self._lengths
        traced = replace(attack, epsilon=epsilon, step_size=step_size)  # type: ignore[arg-type]
        # Capture must not see first-time work (cuDNN's choices, compilation), which happens on a side stream before.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                climb(logits_fn, self._images, self._start, self._labels, traced)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # In the default mode, a call of any other thread, such as one that pins memory, would break the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = climb(logits_fn, self._images, self._start, self._labels, traced)

    def __call__(self, batch: Batch, start: Tensor, attack: Attack) -> Tensor:
        """Adversarial images of the batch, (N, C, H, W); the attack differs from the captured one in lengths only."""
        self._images.copy_(batch.images)
        self._start.copy_(start)
        self._labels.copy_(batch.labels)
        for length, value in zip(self._lengths, (attack.epsilon, attack.step_size), strict=True):
            length.fill_(value)
        self._graph.replay()
        return self._result.clone()
