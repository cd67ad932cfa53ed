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
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from tla_service.attacks import Attack
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.radii import Norm
from tla_service.config.yaml_files import read_yaml
from tla_service.evaluation.results import Curve, share_of
from tla_service.evaluation.shards import ShardOutcome


class Columns(NamedTuple):
    """The attacks of one data set's table by name: white-box ones and transfer attacks."""

    attacks: dict[str, EvaluationAttack]
    transfer: dict[str, EvaluationAttack]


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
_TEST_IMAGES = 10_000
# Smaller and larger radius of the shift ratios.
_LEVELS = {"mnist": (0.03, 0.3), "cifar10": (8 / 255, 25 / 255), "tiny_imagenet": (8 / 255, 25 / 255)}


@cache
def paper_figures() -> dict[str, Any]:
    """The content of `paper.yaml`: `tables` by data set, and `studies` by what they vary."""
    return dict(read_yaml(Path(__file__).with_name("paper.yaml"), "paper"))


def paper_columns(data_name: str, norm: Norm = "linf", epsilon: float | None = None) -> Columns:
    """The paper's columns for a data set, at a radius above 0, by default its table's in L-infinity.

    Steps keep their share of the radius. Fashion-MNIST takes MNIST's columns; data sets that the paper does not have
    take CIFAR-10's.
    """
    table = _TABLES.get(_LIKE.get(data_name, data_name), _TABLES["cifar10"])
    radius = table.epsilon if epsilon is None else epsilon
    made = {}
    for name in table.columns.split():
        kind, steps, restarts = _COLUMN.fullmatch(name).groups()  # type: ignore[union-attr]
        step_size = table.epsilon if kind == "fgsm" else table.step_sizes.get(name, table.step_size)
        # The table's own steps must not pass through a division, so that they stay what they are.
        length = step_size if radius == table.epsilon else step_size * radius / table.epsilon
        counts = {"num_steps": int(steps or 1), "num_restarts": int(restarts or 1)}
        made[name] = EvaluationAttack(kind=kind, norm=norm, epsilon=radius, step_size=length, **counts)
    transfer = {name: attack for name, attack in made.items() if name.startswith("transfer_")}
    return Columns({name: attack for name, attack in made.items() if name not in transfer}, transfer)


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
    figures = paper_figures()["tables"].get(data_name)
    if figures is None or method not in figures["accuracy"]:
        return None
    columns = paper_columns(data_name)
    names = ("clean", *columns.attacks, *columns.transfer)
    accuracy = {name: float(value) for name, value in zip(names, figures["accuracy"][method], strict=True)}
    found = figures["measures"].get(method, {"shift": (), "neighbours": None, "detection": None})
    shift = {radius: (r, r_prime) for radius, (r, r_prime) in zip(_LEVELS[data_name], found["shift"], strict=False)}
    votes = found["neighbours"]
    return PaperRow(accuracy, shift, None if votes is None else (votes[0], votes[1]), found["detection"])


def differences_from_paper(data_name: str, architecture: str, images: int, *, same_attacks: bool) -> list[str]:
    """What sets a measurement apart from the paper's; `same_attacks` is about norm, radius and attacks."""
    figures = paper_figures()["tables"].get(data_name)
    if figures is None:
        return [f"the paper has no {data_name}"]
    differences = []
    if architecture != figures["architecture"]:
        differences.append(f"the network is {architecture}, the paper's is {figures['architecture']}")
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
