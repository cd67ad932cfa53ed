"""Parts of AutoAttack's package, with the same results sooner."""

from collections.abc import Callable

import torch
from torch import Tensor

_MOST_REMEMBERED = 1_000_000


class RememberedMargins:
    """Square's margins (N,) of images (N, C, H, W) with labels (N,), computed once per image and label.

    A query moves a window up or down by the radius. Once few pixels can be improved, most queries move what is at the
    edge of the ball already, or repeat one that was rejected. Takes the place of the package's `margin_and_loss`, whose
    loss is the margin. Images are recognized by 64-bit hashes.
    """

    def __init__(self, margin_and_loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._compute = margin_and_loss
        self._margins: dict[int, float] = {}
        self._factors: Tensor | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The margins, twice: as margin and as loss."""
        keys = self._keys(images, labels)
        unseen = [row for row, key in enumerate(keys) if key not in self._margins]
        if unseen:
            rows = torch.tensor(unseen, device=images.device)
            margins, _ = self._compute(images[rows], labels[rows])
            found = {keys[row]: margin for row, margin in zip(unseen, margins.tolist(), strict=True)}
            self._margins |= found
        margins = torch.tensor([self._margins[key] for key in keys], dtype=images.dtype, device=images.device)
        if len(self._margins) > _MOST_REMEMBERED:
            self._margins.clear()
        return margins, margins.clone()

    def _keys(self, images: Tensor, labels: Tensor) -> list[int]:
        bits = images.flatten(1).view(torch.int32).long()
        if self._factors is None:
            random = torch.Generator().manual_seed(0)
            # Odd factors: each pixel alone changes the sum, which wraps around at 64 bits.
            factors = torch.randint(-(2**62), 2**62, (bits.shape[1] + 1,), generator=random) * 2 + 1
            self._factors = factors.to(images.device)
        keys: list[int] = ((bits * self._factors[1:]).sum(1) + labels * self._factors[0]).tolist()
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
