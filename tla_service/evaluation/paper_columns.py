"""The attacks of the paper's result tables, and sweeps of one attack over radius, steps and restarts.

Kinds, numbers of steps and restarts are those of Mao et al. 2019, Table 1. The paper does not give step sizes by
column, the momentum of MIM, C&W's confidence, the surrogate, or its L2 table. Chosen here:

- Step sizes are the authors' configurations': those of their strong attack (MNIST 0.01, CIFAR-10 1/255, Tiny ImageNet
  2/255), and the training attack's for the columns that repeat it (CIFAR-10's 7 steps of 2/255).
- MIM keeps the whole running gradient (momentum 1, Dong et al. 2018); C&W's confidence is 50, as in the authors' code;
  both start at random as PGD does.
- Radii are those of `tla_service.config.radii`; a step is the same share of the radius in every norm and at every
  radius.
- Tiny ImageNet's first PGD column is printed with 20 steps twice; it is taken as 10, as in the paper's Table 7.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from tla_service.attacks import Attack
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.bounds import Norm
from tla_service.config.radii import documented_radius, no_radius
from tla_service.errors import ConfigError
from tla_service.evaluation.intervals import Interval, wilson_interval
from tla_service.evaluation.outcomes import ShardOutcome

Axis = Literal["epsilon", "steps", "restarts", "l0", "l1"]


class Columns(NamedTuple):
    """The attacks of one data set's table.

    Attributes:
        attacks: White-box attacks by name, in the table's order.
        transfer: Black-box attacks: made on a surrogate, scored on the network.
        epsilon: The radius they share.
    """

    attacks: dict[str, EvaluationAttack]
    transfer: dict[str, EvaluationAttack]
    epsilon: float


class Curve(NamedTuple):
    """Accuracy along one axis.

    Attributes:
        axis: What varies: the radius, the total of gradient steps, the restarts, or the size of a sparse perturbation.
        x: Its values, rising.
        accuracy: Accuracy at each.
    """

    axis: Axis
    x: tuple[float, ...]
    accuracy: tuple[Interval, ...]


class _Table(NamedTuple):
    """Columns as (name, kind, steps, restarts, step size at this L-infinity radius)."""

    epsilon: float
    columns: tuple[tuple[str, str, int, int, float], ...]


_TABLES = {
    "mnist": _Table(
        0.3,
        (
            ("fgsm", "fgsm", 1, 1, 0.3),
            ("bim40", "bim", 40, 1, 0.01),
            ("cw40", "cw", 40, 1, 0.01),
            ("pgd40", "pgd", 40, 1, 0.01),
            ("pgd100", "pgd", 100, 1, 0.01),
            ("pgd100x20", "pgd", 100, 20, 0.01),
            ("mim200", "mim", 200, 1, 0.01),
            ("transfer_pgd100", "pgd", 100, 1, 0.01),
        ),
    ),
    "cifar10": _Table(
        8 / 255,
        (
            ("fgsm", "fgsm", 1, 1, 8 / 255),
            ("bim7", "bim", 7, 1, 2 / 255),
            ("cw30", "cw", 30, 1, 1 / 255),
            ("pgd7", "pgd", 7, 1, 2 / 255),
            ("pgd20", "pgd", 20, 1, 1 / 255),
            ("pgd20x20", "pgd", 20, 20, 1 / 255),
            ("mim40", "mim", 40, 1, 1 / 255),
            ("transfer_pgd7", "pgd", 7, 1, 2 / 255),
        ),
    ),
    "tiny_imagenet": _Table(
        8 / 255,
        (
            ("fgsm", "fgsm", 1, 1, 8 / 255),
            ("bim10", "bim", 10, 1, 2 / 255),
            ("cw10", "cw", 10, 1, 2 / 255),
            ("pgd10", "pgd", 10, 1, 2 / 255),
            ("pgd20", "pgd", 20, 1, 2 / 255),
            ("pgd20x20", "pgd", 20, 20, 2 / 255),
            ("mim40", "mim", 40, 1, 2 / 255),
            ("transfer_pgd10", "pgd", 10, 1, 2 / 255),
        ),
    ),
    "digits": _Table(
        0.15,
        (
            ("fgsm", "fgsm", 1, 1, 0.15),
            ("bim20", "bim", 20, 1, 0.015),
            ("cw50", "cw", 50, 1, 0.015),
            ("pgd20", "pgd", 20, 1, 0.015),
            ("pgd50", "pgd", 50, 1, 0.015),
            ("pgd50x20", "pgd", 50, 20, 0.015),
            ("mim50", "mim", 50, 1, 0.015),
            ("transfer_pgd50", "pgd", 50, 1, 0.015),
        ),
    ),
}
_LIKE = {"fashion_mnist": "mnist"}


def paper_columns(data_name: str, norm: Norm = "linf", epsilon: float | None = None) -> Columns:
    """The paper's columns for a data set.

    Args:
        data_name: As in the catalogue. Fashion-MNIST takes MNIST's columns; sets that the paper does not have take
            CIFAR-10's.
        norm: Norm of the perturbations.
        epsilon: The radius; step sizes keep their share of it. None: the one documented for the data set.

    Raises:
        ConfigError: The radius is not above 0, or none is given or documented.
    """
    if epsilon is not None and not epsilon > 0:
        raise ConfigError("epsilon", epsilon, "leaves nothing to attack with", "give a radius above 0, such as 8/255")
    table = _TABLES.get(_LIKE.get(data_name, data_name), _TABLES["cifar10"])
    radius = documented_radius(data_name, norm) if epsilon is None else epsilon
    if radius is None:
        raise ConfigError("norm", norm, *no_radius(data_name, norm, "epsilon"))
    made = {
        name: EvaluationAttack.model_validate(
            {
                "kind": kind,
                "norm": norm,
                "epsilon": radius,
                # The table's own steps must not pass through a division, so that they stay what they are.
                "step_size": step if radius == table.epsilon else step * radius / table.epsilon,
                "num_steps": steps,
                "num_restarts": restarts,
            }
        )
        for name, kind, steps, restarts, step in table.columns
    }
    transfer = {name: attack for name, attack in made.items() if name.startswith("transfer_")}
    return Columns({name: attack for name, attack in made.items() if name not in transfer}, transfer, radius)


def epsilon_sweep(attack: Attack, epsilons: tuple[float, ...]) -> dict[str, Attack]:
    """The attack at several radii; its step keeps its share of the radius. Names carry the radius."""
    share = attack.step_size / attack.epsilon
    return {f"epsilon={value!r}": replace(attack, epsilon=value, step_size=share * value) for value in sorted(epsilons)}


def step_sweep(attack: Attack, most: int, points: int = 8) -> dict[str, Attack]:
    """The attack with 1 to `most` steps of one start, spaced by equal factors. Names carry the number of steps."""
    counts = sorted({round(float(count)) for count in np.geomspace(1, most, points)})
    return {f"steps={count}": replace(attack, num_steps=count, num_restarts=1) for count in counts}


def sweep_curve(outcome: ShardOutcome, axis: Literal["epsilon", "steps"]) -> Curve:
    """Accuracy along a sweep that was evaluated; it begins with the clean accuracy at 0."""
    names = {float(name.partition("=")[2]): name for name in outcome.broken_at if name.startswith(f"{axis}=")}
    points = [(0.0, "clean"), *sorted(names.items())]
    return Curve(axis, tuple(x for x, _ in points), tuple(_accuracy(outcome, name) for _, name in points))


def restart_curve(outcome: ShardOutcome, attack: str, restarts: int, steps_each: int | None = None) -> Curve:
    """Accuracy after each restart of one attack, from its per-image record: nothing is run again.

    Args:
        outcome: Where the attack was run.
        attack: Its name.
        restarts: How many it had.
        steps_each: Give its steps to count gradient steps instead (20 restarts of 100 make 2000).
    """
    counts = tuple(range(1, restarts + 1))
    accuracy = tuple(_accuracy(outcome, attack, count) for count in counts)
    scale = steps_each or 1
    return Curve("steps" if steps_each else "restarts", tuple(float(scale * count) for count in counts), accuracy)


def _accuracy(outcome: ShardOutcome, attack: str, restarts: int | None = None) -> Interval:
    standing = outcome.standing(attack, restarts)
    return wilson_interval(int(standing.sum()), len(standing))
