"""Parts of AutoAttack's package, with the same results sooner."""

from collections.abc import Callable

import torch
from torch import Tensor

# Remembering pays where repeats are frequent: it ends where fewer than this share of the first queries repeat others.
_LEAST_REPEATS, _FIRST_QUERIES = 0.3, 300


class RememberedMargins:
    """Square's margins (N,) of images (N, C, H, W) with labels (N,), computed once per image and label.

    A query moves a window up or down by the radius. Once few pixels can be improved, most queries move what is at the
    edge of the ball already, or repeat one that was rejected. Takes the place of the package's `margin_and_loss`, whose
    loss is the margin, for one batch of images. Images are recognized by random projections in float64.
    """

    def __init__(self, margin_and_loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._compute = margin_and_loss
        self._margins: dict[float, float] = {}
        self._factors: Tensor | None = None
        self._queries = self._asked = 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The margins, twice: as margin and as loss."""
        if self._queries >= _FIRST_QUERIES and len(self._margins) > (1 - _LEAST_REPEATS) * self._asked:
            return self._compute(images, labels)
        keys = self._keys(images, labels)
        self._queries, self._asked = self._queries + 1, self._asked + len(keys)
        unseen = [row for row, key in enumerate(keys) if key not in self._margins]
        if unseen:
            rows = torch.tensor(unseen, device=images.device)
            margins, _ = self._compute(images[rows], labels[rows])
            self._margins |= {keys[row]: margin for row, margin in zip(unseen, margins.tolist(), strict=True)}
        margins = torch.tensor([self._margins[key] for key in keys], dtype=images.dtype, device=images.device)
        return margins, margins.clone()

    def _keys(self, images: Tensor, labels: Tensor) -> list[float]:
        pixels = images.flatten(1).double()
        if self._factors is None:
            random = torch.Generator().manual_seed(0)
            self._factors = torch.rand(pixels.shape[1], generator=random, dtype=torch.float64).to(images.device)
        # Not a matrix product, whose rounding may depend on the row.
        keys: list[float] = ((pixels * self._factors).sum(1) + 2 * pixels.shape[1] * labels).tolist()
        return keys


def project_linf(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """Shortest steps (N, D) in L-infinity from points (N, D) of [0, 1] onto hyperplanes, within [0, 1].

    Takes the place of the package's `projection_linf`, which sorts. Hyperplanes are normals (N, D) and offsets (N,).
    Coordinate i moves by min(t, room_i) where |normal_i| min(t, room_i) sum up to the distance. That sum is concave and
    piecewise linear in t, so Newton's method rises to the solution in few steps. Where the hyperplane does not meet
    [0, 1], every coordinate moves as far as it can.
    """
    missing = (normals * points).sum(1) - offsets
    normals = torch.where(missing[:, None] >= 0, normals, -normals)
    missing = missing.abs()
    furthest = ((normals < 0).float() - points) * (normals != 0)
    slopes, room = normals.abs(), furthest.abs()
    most = slopes * room
    length = torch.zeros_like(missing)
    for _ in range(normals.shape[1]):
        free = (room > length[:, None]).float()
        left = missing - (most * (1 - free)).sum(1)
        slope = (slopes * free).sum(1)
        longer = torch.where(slope > 0, left / slope, torch.inf).maximum(length)
        if torch.equal(longer, length):
            break
        length = longer
    return torch.minimum(torch.maximum(furthest, -length[:, None]), length[:, None])
