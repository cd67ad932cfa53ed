"""The documented radius of each data set and norm; docs/evaluation.md has the same table for readers.

A radius means something in one norm only: 8/255 in L-infinity is a visible perturbation, 8/255 as an L2 length is next
to none. Whatever names a norm other than the one a radius was given for takes the radius from here, or is refused.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tla_service.config.bounds import Norm
from tla_service.errors import ConfigError


class Radius(NamedTuple):
    """A documented radius.

    Attributes:
        epsilon: In pixels of [0, 1] (L-infinity), or an L2 length.
        source: Where it is from.
    """

    epsilon: float
    source: str


RADII: dict[tuple[str, Norm], Radius] = {
    ("mnist", "linf"): Radius(0.3, "Madry et al. 2018; Mao et al. 2019"),
    ("mnist", "l2"): Radius(2.0, "Tramèr and Boneh 2019"),
    ("fashion_mnist", "linf"): Radius(0.1, "Wong and Kolter 2018"),
    ("cifar10", "linf"): Radius(8 / 255, "Madry et al. 2018; Mao et al. 2019; RobustBench"),
    ("cifar10", "l2"): Radius(128 / 255, "Rice et al. 2020; RobustBench rounds it to 0.5"),
    ("cifar100", "linf"): Radius(8 / 255, "Rice et al. 2020; RobustBench"),
    ("cifar100", "l2"): Radius(128 / 255, "Rice et al. 2020"),
    ("tiny_imagenet", "linf"): Radius(8 / 255, "Mao et al. 2019"),
    ("tiny_imagenet", "l2"): Radius(128 / 255, "CIFAR-10's; there is no convention"),
    ("digits", "linf"): Radius(0.15, "this project's preset"),
    ("digits", "l2"): Radius(0.6, "this project's: half of 0.15 on each of the 64 pixels"),
}

_LENGTHS = {"epsilon", "step_size"}


def documented_radius(data_name: str, norm: Norm) -> float | None:
    """The radius that is documented for a data set in a norm; None where there is none."""
    found = RADII.get((data_name, norm))
    return None if found is None else found.epsilon


def no_radius(data_name: str, norm: Norm, flag: str) -> tuple[str, str]:
    """Reason and remedy of a refusal: a norm without a radius.

    Args:
        data_name: The data set.
        norm: The norm that was named.
        flag: Setting that takes the radius.
    """
    reason = f"no radius is given in this norm, and none is documented for {data_name}"
    example = "0.5" if norm == "l2" else "8/255"
    return reason, f"give {flag} in {norm}, such as {example}"


def without_lengths_of_other_norms(values: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings of a run without the radii and step sizes of a norm that is replaced above the file.

    Args:
        values: Settings as the file has them.
        above: Settings that win over the file's.

    Returns:
        The settings; an attack whose norm is the same with those above is as it was.

    Raises:
        ConfigError: The norm of the training attack is replaced, and not its radius and step size.
    """
    attack, attack_above = _section(values, "attack"), _section(above, "attack")
    norm = attack.get("norm", "linf")
    final = attack_above.get("norm", norm)
    kept = {**values}
    if final != norm and _LENGTHS & {*attack}:
        if not {*attack_above} >= _LENGTHS:
            name = _section(above, "data").get("name") or _section(values, "data").get("name") or "digits"
            reason = f"radius and step size are given in {norm}"
            raise ConfigError(
                "attack.norm", final, reason, f"give attack.epsilon and attack.step_size{_hint(name, final)}"
            )
        kept["attack"] = _without_lengths(attack)
    evaluation, evaluation_above = _section(values, "evaluation"), _section(above, "evaluation")

    def keep(found: Any, other: Mapping[str, Any]) -> Any:
        if not isinstance(found, dict):
            return found
        own = found.get("norm") or norm
        replaced = (other.get("norm") or found.get("norm") or final) != own
        return _without_lengths(found) if replaced else found

    changed = {}
    if "validation" in evaluation:
        changed["validation"] = keep(evaluation["validation"], _section(evaluation_above, "validation"))
    test, test_above = _section(evaluation, "test"), _section(evaluation_above, "test")
    if test:
        changed["test"] = {name: keep(found, _section(test_above, name)) for name, found in test.items()}
    if changed:
        kept["evaluation"] = {**evaluation, **changed}
    return kept


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _without_lengths(attack: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attack.items() if name not in _LENGTHS}


def _hint(data_name: str, norm: Norm) -> str:
    radius = documented_radius(data_name, norm)
    return "" if radius is None else f" in {norm}; the documented radius of {data_name} is {radius:.4g}"
