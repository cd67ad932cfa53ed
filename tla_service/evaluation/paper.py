"""The attacks and figures of the paper's result tables, and sweeps of an attack over radius, steps and restarts.

Kinds, numbers of steps and restarts are those of Mao et al. 2019, Table 1; Tiny ImageNet's first PGD column, printed
with 20 steps twice, is taken as 10, as in Table 7. What the paper does not give is chosen here: step sizes are those of
the authors' configurations for their strong attack, and for the columns that repeat the training attack its own. MIM
keeps the whole running gradient (Dong et al. 2018), C&W's confidence is 50, as in the authors' code; both start at
random as PGD does. Radii are those of `tla_service.config.radii`; a step is the same share of the radius everywhere.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from tla_service.attacks import Attack
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.radii import Norm, documented_radius, no_radius
from tla_service.errors import ConfigError
from tla_service.evaluation.results import Curve, share_of
from tla_service.evaluation.shards import ShardOutcome


class Columns(NamedTuple):
    """The attacks of one data set's table: white-box ones by name, transfer attacks, and the radius they share."""

    attacks: dict[str, EvaluationAttack]
    transfer: dict[str, EvaluationAttack]
    epsilon: float


class _Table(NamedTuple):
    """Columns by name (kind, steps, starts) and their step size at this L-infinity radius; FGSM takes one of it."""

    epsilon: float
    step_size: float
    columns: str
    step_sizes: Mapping[str, float] = MappingProxyType({})  # of columns with another one


_TABLES = {
    "mnist": _Table(0.3, 0.01, "fgsm bim40 cw40 pgd40 pgd100 pgd100x20 mim200 transfer_pgd100"),
    "cifar10": _Table(
        8 / 255,
        1 / 255,
        "fgsm bim7 cw30 pgd7 pgd20 pgd20x20 mim40 transfer_pgd7",
        dict.fromkeys(("bim7", "pgd7", "transfer_pgd7"), 2 / 255),
    ),
    "tiny_imagenet": _Table(8 / 255, 2 / 255, "fgsm bim10 cw10 pgd10 pgd20 pgd20x20 mim40 transfer_pgd10"),
    "digits": _Table(0.15, 0.015, "fgsm bim20 cw50 pgd20 pgd50 pgd50x20 mim50 transfer_pgd50"),
}
_COLUMN = re.compile(r"(?:transfer_)?([a-z]+)(\d*)(?:x(\d+))?")
_LIKE = {"fashion_mnist": "mnist"}
# The paper's own figures, in percent as printed: none is ever taken for a figure of ours.
_ARCHITECTURES = {"mnist": "mnist_cnn", "cifar10": "wrn_32_10", "tiny_imagenet": "tiny_resnet50_stride2"}
_TEST_IMAGES = 10_000
_ACCURACY = {
    "mnist": {
        "natural": (99.20, 34.48, 0, 0, 0, 0, 0, 0, 81.81),
        "at": (99.24, 97.31, 95.95, 96.66, 96.58, 94.82, 93.87, 95.47, 96.67),
        "alp": (98.91, 97.34, 96.00, 96.50, 96.62, 95.06, 94.93, 95.41, 96.95),
        "tla_rn": (99.50, 98.12, 97.17, 97.17, 97.64, 97.07, 96.73, 96.84, 97.69),
        "tla_sa": (99.44, 98.14, 97.08, 97.45, 97.50, 96.78, 95.64, 96.45, 97.65),
        "tla": (99.52, 98.17, 97.32, 97.25, 97.72, 96.96, 96.79, 96.64, 97.73),
    },
    "cifar10": {
        "natural": (95.01, 13.35, 0, 0, 0, 0, 0, 0, 7.60),
        "at": (87.14, 55.63, 48.29, 46.97, 49.79, 45.72, 45.21, 45.16, 62.83),
        "alp": (89.79, 60.29, 50.62, 47.59, 51.89, 48.50, 45.98, 45.97, 67.27),
        "tla_rn": (81.02, 55.41, 51.44, 49.66, 52.50, 49.94, 45.55, 49.63, 65.96),
        "tla_sa": (86.19, 58.80, 52.19, 49.64, 53.53, 49.70, 49.15, 49.29, 61.67),
        "tla": (86.21, 58.88, 52.60, 50.69, 53.87, 51.59, 50.03, 50.09, 70.63),
    },
    "tiny_imagenet": {
        "natural": (53.85, 8.07, 0.69, 0.04, 0.84, 0.39, 0, 0, 27.08),
        "at": (34.60, 19.34, 13.66, 11.42, 13.79, 13.46, 13.33, 13.57, 19.62),
        "alp": (43.20, 19.85, 11.24, 9.70, 11.37, 10.87, 10.59, 10.75, 22.08),
        "tla_rn": (35.88, 19.93, 14.08, 11.42, 14.23, 13.89, 13.65, 11.29, 20.27),
        "tla_sa": (34.91, 19.42, 13.57, 11.34, 13.75, 13.33, 13.19, 13.22, 19.90),
        "tla": (36.79, 20.95, 14.89, 12.47, 15.05, 14.65, 14.43, 14.74, 21.09),
    },
}
# (r, r') at the smaller and at the larger radius, neighbours (attacked, clean), detection.
_MEASURES: dict[str, dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float] | None, float]]] = {
    "mnist": {
        "natural": ((1.485, 1.071), (1.194, 2.159), None, 94.83),
        "at": ((1.288, 1.004), (1.308, 1.042), (93.01, 98.68), 91.25),
        "alp": ((1.398, 1.006), (1.394, 1.068), (95.2, 98.43), 89.77),
        "tla": ((1.81, 1.005), (1.847, 1.072), (96.98, 99.47), 94.94),
    },
    "cifar10": {
        "natural": ((0.8082, 3.604), (0.9208, 3.682), None, 23.95),
        "at": ((1.053, 1.342), (1.007, 1.714), (47.46, 87.06), 61.07),
        "alp": ((1.038, 2.313), (1.21, 3.796), (48.85, 89.63), 63.15),
        "tla": ((1.093, 1.191), (1.39, 1.491), (51.74, 86.29), 69.6),
    },
    "tiny_imagenet": {
        "natural": ((0.9236, 1.284), (0.9293, 1.328), None, 50.12),
        "at": ((0.9774, 1.059), (0.9504, 1.2), (14.18, 30.27), 60.02),
        "alp": ((0.984, 1.076), (0.936, 1.216), (14.56, 38.14), 54.66),
        "tla": ((0.9979, 1.052), (0.9995, 1.2), (15.9, 35.88), 65.31),
    },
}
_LEVELS = {"mnist": (0.03, 0.3), "cifar10": (8 / 255, 25 / 255), "tiny_imagenet": (8 / 255, 25 / 255)}


def paper_columns(data_name: str, norm: Norm = "linf", epsilon: float | None = None) -> Columns:
    """The paper's columns for a data set, at a radius, by default the documented one; steps keep their share of it.

    Fashion-MNIST takes MNIST's columns; data sets that the paper does not have take CIFAR-10's. ConfigError if the
    radius is not above 0, or none is given or documented.
    """
    if epsilon is not None and not epsilon > 0:
        raise ConfigError("epsilon", epsilon, "leaves nothing to attack with", "give a radius above 0, such as 8/255")
    table = _TABLES.get(_LIKE.get(data_name, data_name), _TABLES["cifar10"])
    radius = documented_radius(data_name, norm) if epsilon is None else epsilon
    if radius is None:
        raise ConfigError("norm", norm, *no_radius(data_name, norm, "epsilon"))
    made = {}
    for name in table.columns.split():
        kind, steps, restarts = _COLUMN.fullmatch(name).groups()  # type: ignore[union-attr]
        step_size = table.epsilon if kind == "fgsm" else table.step_sizes.get(name, table.step_size)
        made[name] = EvaluationAttack.model_validate(
            {
                "kind": kind,
                "norm": norm,
                "epsilon": radius,
                # The table's own steps must not pass through a division, so that they stay what they are.
                "step_size": step_size if radius == table.epsilon else step_size * radius / table.epsilon,
                "num_steps": int(steps or 1),
                "num_restarts": int(restarts or 1),
            }
        )
    transfer = {name: attack for name, attack in made.items() if name.startswith("transfer_")}
    return Columns({name: attack for name, attack in made.items() if name not in transfer}, transfer, radius)


class PaperRow(NamedTuple):
    """What the paper reports of a method on a data set, as printed, in percent, but for the shift ratios.

    `accuracy` by attack (Table 1), `shift` (r, r') by radius (Tables 2 and 3), `neighbours` attacked and clean
    (Table 4), `detection` (Fig. 5).
    """

    accuracy: dict[str, float]
    shift: dict[float, tuple[float, float]]
    neighbours: tuple[float, float] | None
    detection: float | None

    def at(self, epsilon: float) -> tuple[float, float] | tuple[str, str]:
        """(r, r') at a radius, or empty cells."""
        return next((pair for radius, pair in self.shift.items() if abs(radius - epsilon) < 1e-6), ("", ""))


def paper_row(data_name: str, method: str) -> PaperRow | None:
    """The paper's row of a method, or None where it has none."""
    accuracy = _ACCURACY.get(data_name, {}).get(method)
    if accuracy is None:
        return None
    columns = paper_columns(data_name)
    names = ("clean", *columns.attacks, *columns.transfer)
    named = {name: float(value) for name, value in zip(names, accuracy, strict=True)}
    measures = _MEASURES[data_name].get(method)
    if measures is None:
        return PaperRow(named, {}, None, None)
    small, large = _LEVELS[data_name]
    at_small, at_large, votes, detection = measures
    return PaperRow(named, {small: at_small, large: at_large}, votes, detection)


def differences_from_paper(data_name: str, architecture: str, images: int, *, same_attacks: bool) -> list[str]:
    """What sets a measurement apart from the paper's; `same_attacks` is about norm, radius and attacks."""
    if data_name not in _ACCURACY:
        return [f"the paper has no {data_name}"]
    differences = []
    if architecture != _ARCHITECTURES[data_name]:
        differences.append(f"the network is {architecture}, the paper's is {_ARCHITECTURES[data_name]}")
    if not same_attacks:
        differences.append("norm, radius or attacks are not the paper's")
    if images != _TEST_IMAGES:
        differences.append(f"{images} test images, the paper's {_TEST_IMAGES}")
    return differences


def epsilon_sweep(attack: Attack, epsilons: tuple[float, ...]) -> dict[str, Attack]:
    """The attack at several radii; its step keeps its share of the radius. Names carry the radius."""
    share = attack.step_size / attack.epsilon
    return {f"epsilon={value!r}": replace(attack, epsilon=value, step_size=share * value) for value in sorted(epsilons)}


def step_sweep(attack: Attack, most: int, points: int = 8) -> dict[str, Attack]:
    """The attack with 1 to `most` steps of one start, spaced by equal factors. Names carry the number of steps."""
    counts = sorted({round(float(count)) for count in np.geomspace(1, most, points)})
    return {f"steps={count}": replace(attack, num_steps=count, num_restarts=1) for count in counts}


def sweep_curve(outcome: ShardOutcome, axis: Literal["epsilon", "steps"], attack: str) -> Curve:
    """Accuracy along a sweep that was evaluated; it begins with the clean accuracy at 0."""
    names = {float(name.partition("=")[2]): name for name in outcome.broken_at if name.startswith(f"{axis}=")}
    points = [(0.0, "clean"), *sorted(names.items())]
    accuracy = tuple(share_of(outcome.standing(name)) for _, name in points)
    return Curve(attack, axis, tuple(x for x, _ in points), accuracy)


def restart_curve(outcome: ShardOutcome, name: str, restarts: int, attack: str, steps_each: int | None = None) -> Curve:
    """Accuracy after each restart of one attack, from its per-image record: nothing is run again.

    `attack` is what the curve is called; `steps_each` counts gradient steps instead (20 restarts of 100 make 2000).
    """
    counts = range(1, restarts + 1)
    accuracy = tuple(share_of(outcome.standing(name, count)) for count in counts)
    x = tuple(float((steps_each or 1) * count) for count in counts)
    return Curve(attack, "steps" if steps_each else "restarts", x, accuracy)
