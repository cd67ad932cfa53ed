"""Parts of AutoAttack's package, with the same results sooner."""

import math
from typing import Any

import torch
from torch import Tensor


def search_squares(square: Any, images: Tensor, labels: Tensor) -> tuple[None, Tensor]:
    """Square's random search in L-infinity on images (N, C, H, W), without queries that are known to be in vain.

    Takes the place of the package's `attack_single_run`, with its draws, for a deterministic network; the images
    found are returned second. Each query moves one window of all images up or down. Once few pixels can be improved,
    most moves meet the edge of the ball, or repeat one that was rejected since the image last changed.
    """
    channels, height, width = images.shape[1:]
    lowest, highest = (images - square.eps).clamp_min(0), (images + square.eps).clamp_max(1)
    best = (images + square.eps * square.random_choice([len(images), channels, 1, width])).clamp(0, 1)
    margins, _ = square.margin_and_loss(best, labels)
    moves: dict[tuple[float, ...], int] = {}
    in_vain = torch.zeros(len(images), square.n_queries, dtype=torch.bool, device=images.device)
    for query in range(square.n_queries):
        area = square.p_selection(query) * channels * height * width / channels  # rounds as in the package
        side = min(max(round(math.sqrt(area)), 1), height, width)
        top, left = (int(square.random_int(0, length - side)) for length in (height, width))
        signs = square.random_choice([channels, 1, 1])
        move = moves.setdefault((side, top, left, *signs.flatten().tolist()), len(moves))
        standing = margins > 0
        if not standing.any():
            break
        rows = (standing & ~in_vain[:, move]).nonzero().squeeze(1)
        in_vain[rows, move] = True
        window = (..., slice(top, top + side), slice(left, left + side))
        moved = (best[window][rows] + 2 * square.eps * signs).clamp(lowest[window][rows], highest[window][rows])
        changed = (moved != best[window][rows]).flatten(1).any(1)
        rows = rows[changed]
        if not len(rows):
            continue
        tried = best[rows]
        tried[window] = moved[changed]
        found, _ = square.margin_and_loss(tried, labels[rows])
        better = (found < margins[rows]) | (found <= 0)
        rows = rows[better]
        best[rows], margins[rows], in_vain[rows] = tried[better], found[better], False
    return None, best


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
