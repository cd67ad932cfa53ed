"""Valid radii and step sizes, and the documented radius of each data set and norm, as in docs/evaluation.md.

A radius is meaningful in one norm only: 8/255 in L-infinity is a visible perturbation, 8/255 as an L2 length is almost
none. Naming another norm than the one that a radius was given for takes the radius from here, or is an error.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from tla_service.errors import ConfigError

Norm = Literal["linf", "l2"]
_AnyNorm = Literal["linf", "l2", "l1", "l0"]
ImageShape = tuple[int, int, int]

_LEVELS = 255
# A step may cross the ball once; a longer one jumps from side to side. The margin is for rounding.
_LONGEST_STEP = 2 * (1 + 1e-9)
_SHORTEST_PATH = 0.005  # steps that cover less of the radius in total leave the image where it starts
# (C, H, W) of data sets with images of one size.
_SHAPES: dict[str, ImageShape] = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "tiny_imagenet": (3, 64, 64),
}
# In pixels of [0, 1] (L-infinity), an L2 or L1 length, or the number of pixels (L0); and where it is from.
RADII: dict[tuple[str, _AnyNorm], tuple[float, str]] = {
    ("mnist", "linf"): (0.3, "Madry et al. 2018; Mao et al. 2019"),
    ("mnist", "l2"): (2.0, "Tramèr and Boneh 2019"),
    ("fashion_mnist", "linf"): (0.1, "Wong and Kolter 2018"),
    ("cifar10", "linf"): (8 / 255, "Madry et al. 2018; Mao et al. 2019; RobustBench"),
    ("cifar10", "l2"): (128 / 255, "Rice et al. 2020; RobustBench rounds it to 0.5"),
    ("cifar100", "linf"): (8 / 255, "Rice et al. 2020; RobustBench"),
    ("cifar100", "l2"): (128 / 255, "Rice et al. 2020"),
    ("tiny_imagenet", "linf"): (8 / 255, "Mao et al. 2019"),
    ("tiny_imagenet", "l2"): (128 / 255, "CIFAR-10's; there is no convention"),
    ("digits", "linf"): (0.15, "this project's preset"),
    ("digits", "l2"): (0.6, "this project's: half of 0.15 on each of the 64 pixels"),
    ("mnist", "l1"): (10.0, "Tramèr and Boneh 2019"),
    ("mnist", "l0"): (12.0, "Schott et al. 2019"),
    ("cifar10", "l1"): (12.0, "Maini et al. 2020; Croce and Hein 2021"),
    ("cifar10", "l0"): (20.0, "Zhong et al. 2024, who count pixels"),
}
_LENGTHS = {"epsilon", "step_size"}


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
) -> ConfigError | None:
    """The first thing wrong with radius and step size of an attack on images (C, H, W) in [0, 1], or None.

    `where` is the section of the attack, such as `attack`; empty for a job's own settings. The step size is None for
    attacks that choose their own, the number of steps and the shape if not known.
    """
    prefix = f"{where}." if where else ""
    radius, step = f"{prefix}epsilon", f"{prefix}step_size"
    if norm == "linf" and epsilon > 1:
        return _beyond(radius, epsilon, 1.0, "outside (0, 1]")
    diagonal = math.sqrt(math.prod(shape)) if shape is not None else math.inf
    if norm == "l2" and epsilon > diagonal:
        size = "x".join(map(str, shape or ()))
        return _beyond(radius, epsilon, diagonal, f"longer than the diagonal of {size} images, {diagonal:.4g}")
    if step_size is None:
        return None
    if step_size > _LONGEST_STEP * epsilon:
        remedy = f"use at most {2 * epsilon:g}"
        if step_size >= 1 and step_size / _LEVELS <= 2 * epsilon:
            remedy = f"write {step_size:g}/255 if it is in 8-bit levels, or {remedy}"
        return ConfigError(step, f"{step_size:g}", f"over twice {radius}={epsilon:g}, one step leaves the ball", remedy)
    if num_steps is not None and num_steps * step_size < _SHORTEST_PATH * epsilon:
        reason = f"{num_steps} steps cover less than 0.5% of {radius}={epsilon:g}"
        return ConfigError(step, f"{step_size:g}", reason, f"use about {2.5 * epsilon / num_steps:.2g}, or more steps")
    return None


def _beyond(field: str, value: float, largest: float, reason: str) -> ConfigError:
    """A length that is probably meant in 8-bit levels."""
    in_levels = value <= _LEVELS and value / _LEVELS <= largest
    at_most = math.floor(100 * largest) / 100
    return ConfigError(field, f"{value:g}", reason, f"write {value:g}/255" if in_levels else f"use at most {at_most:g}")


def documented_radius(data_name: str, norm: Norm) -> float | None:
    """The documented radius of a data set in a norm, if there is one."""
    return RADII.get((data_name, norm), (None, ""))[0]


def customary_radius(data_name: str, norm: _AnyNorm, shape: ImageShape) -> tuple[float, str]:
    """The radius that a norm is reported at for a data set of images (C, H, W), and where it is from.

    Without one in the literature it is MNIST's for greyscale images and CIFAR-10's for others: the same in L-infinity,
    scaled to the number of values in L1 and L0 (at least one value), and to its root in L2.
    """
    if (data_name, norm) in RADII:
        return RADII[data_name, norm]
    model, name = ("mnist", "MNIST") if shape[0] == 1 else ("cifar10", "CIFAR-10")
    radius, more = RADII[model, norm][0], math.prod(shape) / math.prod(_SHAPES[model])
    scaled = {"linf": radius, "l2": radius * math.sqrt(more), "l1": radius * more, "l0": max(1, round(radius * more))}
    return float(scaled[norm]), f"as {name}'s" if more == 1 or norm == "linf" else f"{name}'s, scaled to the image size"


def no_radius(data_name: str, norm: Norm, flag: str) -> tuple[str, str]:
    """Reason and remedy for a norm without a radius; `flag` is the setting that takes the radius."""
    reason = f"no radius is given in this norm, and none is documented for {data_name}"
    return reason, f"give {flag} in {norm}, such as {'0.5' if norm == 'l2' else '8/255'}"


def without_lengths_of_other_norms(values: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings without the radii and step sizes of norms that sources `above` the file replace."""
    attack, attack_above = _section(values, "attack"), _section(above, "attack")
    norm = attack.get("norm", "linf")
    final = attack_above.get("norm", norm)
    if final not in get_args(Norm):
        return dict(values)  # pydantic says what is wrong with it
    if final != norm and _LENGTHS & {*attack} and not {*attack_above} >= _LENGTHS:
        name = str(_section(above, "data").get("name") or _section(values, "data").get("name") or "digits")
        radius = documented_radius(name, final)
        hint = "" if radius is None else f" in {final}; the documented radius of {name} is {radius:.4g}"
        reason = f"radius and step size are given in {norm}"
        raise ConfigError("attack.norm", final, reason, f"give attack.epsilon and attack.step_size{hint}")

    result = copy.deepcopy(dict(values))
    tests = [("evaluation", "test", name) for name in _section(values, "evaluation", "test")]
    for path in [("attack",), ("evaluation", "validation"), *tests]:
        found = _section(result, *path)
        named = found.get("norm")
        if (_section(above, *path).get("norm") or named or final) != (named or norm):
            for length in _LENGTHS & found.keys():
                del found[length]
    return result


def _section(values: Any, *path: str) -> dict[str, Any]:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values if isinstance(values, dict) else {}
