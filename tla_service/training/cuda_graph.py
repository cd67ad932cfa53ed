"""All steps of an attack as one CUDA graph."""

import torch
from torch import Tensor

from tla_service.attacks import Attack, LogitsFn, climb
from tla_service.data import Batch

_WARM_UP = 3


class GraphedClimb:
    """All steps of an attack, forward and backward, replayed as one CUDA graph for batches of the given one's shape.

    The storage of the weights behind `logits_fn` must not change; the next replay overwrites `embeddings`, those of the
    last forward pass.
    """

    def __init__(self, logits_fn: LogitsFn, batch: Batch, start: Tensor, attack: Attack) -> None:
        self.embeddings: Tensor | None = None
        self._images, self._start, self._labels = batch.images.clone(), start.clone(), batch.labels.clone()
        # Capture must not see first-time work (cuDNN's choices, compilation), which happens on a side stream before.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                climb(logits_fn, self._images, self._start, self._labels, attack)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = climb(logits_fn, self._images, self._start, self._labels, attack)

    def __call__(self, batch: Batch, start: Tensor) -> Tensor:
        """Adversarial images of the batch, (N, C, H, W)."""
        self._images.copy_(batch.images)
        self._start.copy_(start)
        self._labels.copy_(batch.labels)
        self._graph.replay()
        return self._result.clone()
