"""The documented radius of each data set and norm; docs/evaluation.md has the same table.

A radius is meaningful in one norm only: 8/255 in L-infinity is a visible perturbation, 8/255 as an L2 length is almost
none. Naming another norm than the one that a radius was given for takes the radius from here, or is an error.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tla_service.config.bounds import Norm
from tla_service.errors import ConfigError


class Radius(NamedTuple):
    """A documented radius: in pixels of [0, 1] (L-infinity) or an L2 length, and where it is from."""

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
    """The documented radius of a data set in a norm, if there is one."""
    found = RADII.get((data_name, norm))
    return None if found is None else found.epsilon


def no_radius(data_name: str, norm: Norm, flag: str) -> tuple[str, str]:
    """Reason and remedy for a norm without a radius; `flag` is the setting that takes the radius."""
    reason = f"no radius is given in this norm, and none is documented for {data_name}"
    return reason, f"give {flag} in {norm}, such as {'0.5' if norm == 'l2' else '8/255'}"


def without_lengths_of_other_norms(values: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings without the radii and step sizes of norms that sources above the file replace.

    Args:
        values: Settings of the file.
        above: Settings that take precedence over them.

    Raises:
        ConfigError: The norm of the training attack is replaced, but not its radius and step size.
    """
    attack, attack_above = _section(values, "attack"), _section(above, "attack")
    norm = attack.get("norm", "linf")
    final = attack_above.get("norm", norm)
    if final != norm and _LENGTHS & {*attack} and not {*attack_above} >= _LENGTHS:
        name = _section(above, "data").get("name") or _section(values, "data").get("name") or "digits"
        radius = documented_radius(name, final)
        hint = "" if radius is None else f" in {final}; the documented radius of {name} is {radius:.4g}"
        reason = f"radius and step size are given in {norm}"
        raise ConfigError("attack.norm", final, reason, f"give attack.epsilon and attack.step_size{hint}")

    def kept(section: Mapping[str, Any], section_above: Mapping[str, Any], *names: str) -> dict[str, Any]:
        """The section, and in it the attacks of these names without the lengths of a replaced norm."""
        changed = {**section}
        for name in names:
            found = section.get(name)
            if isinstance(found, dict):
                own = found.get("norm") or norm
                same = (_section(section_above, name).get("norm") or found.get("norm") or final) == own
                changed[name] = {key: value for key, value in found.items() if same or key not in _LENGTHS}
        return changed

    result = kept(values, above, "attack")
    evaluation, evaluation_above = _section(values, "evaluation"), _section(above, "evaluation")
    if evaluation:
        result["evaluation"] = kept(evaluation, evaluation_above, "validation")
        test = _section(evaluation, "test")
        if test:
            result["evaluation"]["test"] = kept(test, _section(evaluation_above, "test"), *test)
    return result


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}
