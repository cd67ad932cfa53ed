"""Valid radii and step sizes; every section with an attack checks them here."""

import math
from typing import Literal

from tla_service.config.fields import Trouble

Norm = Literal["linf", "l2"]
ImageShape = tuple[int, int, int]

_LEVELS = 255
# A step may cross the ball once; a longer one jumps from side to side. The margin is for rounding.
_LONGEST_STEP = 2 * (1 + 1e-9)
# Steps that cover less of the radius than this in total leave the image where it starts.
_SHORTEST_PATH = 0.005
# (C, H, W) of data sets with images of one size.
_SHAPES: dict[str, ImageShape] = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "tiny_imagenet": (3, 64, 64),
}


def known_shape(data_name: str, image_size: int | None) -> ImageShape | None:
    """(C, H, W) of a data set's images, if known without reading it."""
    shape = _SHAPES.get(data_name)
    return shape if shape is None or image_size is None else (shape[0], image_size, image_size)


def length_trouble(
    where: str,
    norm: Norm,
    epsilon: float,
    step_size: float | None = None,
    num_steps: int | None = None,
    shape: ImageShape | None = None,
) -> Trouble | None:
    """The first thing wrong with radius and step size of an attack on images in [0, 1], or None.

    Args:
        where: Section of the attack, for messages, such as `attack`; empty for a job's own settings.
        norm: Norm of the perturbation.
        epsilon: Radius.
        step_size: Step size; None for attacks that choose their own.
        num_steps: Number of steps, if known.
        shape: (C, H, W) of the images, if known.
    """
    prefix = f"{where}." if where else ""
    radius = f"{prefix}epsilon"
    if norm == "linf" and epsilon > 1:
        return _beyond(radius, epsilon, 1.0, "outside (0, 1]")
    diagonal = math.sqrt(math.prod(shape)) if shape is not None else math.inf
    if norm == "l2" and epsilon > diagonal:
        size = "x".join(map(str, shape or ()))
        return _beyond(radius, epsilon, diagonal, f"longer than the diagonal of {size} images, {diagonal:.4g}")
    if step_size is None:
        return None
    step = f"{prefix}step_size"
    if step_size > _LONGEST_STEP * epsilon:
        remedy = f"use at most {2 * epsilon:g}"
        if step_size >= 1 and step_size / _LEVELS <= 2 * epsilon:
            remedy = f"write {step_size:g}/255 if it is in 8-bit levels, or {remedy}"
        return Trouble(step, f"{step_size:g}", f"over twice {radius}={epsilon:g}, one step leaves the ball", remedy)
    if num_steps is not None and num_steps * step_size < _SHORTEST_PATH * epsilon:
        reason = f"{num_steps} steps cover less than 0.5% of {radius}={epsilon:g}"
        return Trouble(step, f"{step_size:g}", reason, f"use about {2.5 * epsilon / num_steps:.2g}, or more steps")
    return None


def _beyond(field: str, value: float, largest: float, reason: str) -> Trouble:
    """A length that is probably meant in 8-bit levels."""
    in_levels = value <= _LEVELS and value / _LEVELS <= largest
    at_most = math.floor(100 * largest) / 100
    return Trouble(field, f"{value:g}", reason, f"write {value:g}/255" if in_levels else f"use at most {at_most:g}")
