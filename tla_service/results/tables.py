"""What each table trains and measures: the paper's settings, or reduced ones that two CPU cores finish in time."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tla_service.config import RunConfig
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.loading import RunSettings, read_settings
from tla_service.evaluation.paper_columns import paper_columns
from tla_service.results.settings import ReproduceSettings

POOL_SIZES = (1, 250, 500, 1000, 2000)
# The reduced settings at full length: minutes on two cores; shorter budgets take their share of steps and images.
FULL_MINUTES = {"paper": 120.0, "modern": 45.0}
FULL_STEPS, FULL_IMAGES = 430, 1000
_REDUCED_PRESET = {"mnist": "mnist_small", "digits": "digits"}
_REDUCED_FLAGS = {
    # The paper's networks are out of a CPU's reach; this one is not, and learns CIFAR-10 poorly. The page says so.
    "cifar10": ("--model.name", "small_cnn", "--training.global_batch_size", "256", "--mining.pool", "batch"),
    "tiny_imagenet": ("--model.name", "small_cnn", "--training.global_batch_size", "256", "--mining.pool", "batch"),
}
# The modern recipe in so few steps: a rate that rises and falls once, and averages over ten steps, not a thousand (0.9
# was better than 0.98 for all three methods, on validation).
_REDUCED_MODERN = (
    "--model.name small_cnn --training.global_batch_size 256 --training.epochs 2 --training.ema_decay 0.9 "
    "--no-training.channels_last --schedule.name cyclic --schedule.warmup 0 --evaluation.every_epochs 1 "
)
# As in the paper's reduced recipe: what learns at this radius in so few steps.
_REDUCED_MODERN_MNIST = (
    "--attack.step_size 0.075 --attack.num_steps 7 --attack.warmup 0.5 --optimizer.learning_rate 0.01 "
    "--evaluation.validation.step_size 0.03 --evaluation.validation.num_steps 20"
)
# TRADES' weight on MNIST (Zhang et al. 2019, section 5.3.1).
_MODERN_FLAGS = {("mnist", "trades"): ("--loss.robust_weight", "1")}


@dataclass(frozen=True)
class Unit:
    """One run of a table: trained, then measured.

    Attributes:
        name: Folder of the run.
        method: As configured.
        seed: As configured.
        pool_size: Of the study of pool sizes; None for a row of the table.
        surrogate: Folder of the run that transfer attacks are crafted on: the same method with the next seed.
    """

    name: str
    method: str
    seed: int
    pool_size: int | None = None
    surrogate: str | None = None


def units(settings: ReproduceSettings) -> Iterator[Unit]:
    """All runs, seed by seed, so that a table cut short has all methods; the study last."""
    for seed in range(settings.seeds):
        for method in settings.all_methods:
            other = f"{method}-s{(seed + 1) % settings.seeds}" if settings.seeds > 1 else None
            yield Unit(f"{method}-s{seed}", method, seed, surrogate=other)
    if settings.pools and settings.recipe == "paper":
        for seed in range(settings.seeds):
            for size in POOL_SIZES:
                yield Unit(f"tla-pool{size}-s{seed}", "tla", seed, pool_size=size)


def share_of_budget(settings: ReproduceSettings) -> float:
    """The share of the reduced settings' full length that the budget pays for, at most 1."""
    full = FULL_MINUTES[settings.recipe]
    return min(1.0, (settings.budget or full) / full)


def run_config(settings: ReproduceSettings, unit: Unit) -> RunConfig:
    """The run's configuration: what the preset says, shortened where there is a budget."""
    preset: str = settings.table
    flags: list[str] = []
    if settings.recipe == "modern":
        preset = f"modern_{settings.table}"
        flags += _MODERN_FLAGS.get((settings.table, unit.method), ())
    if settings.budget is not None:
        steps = max(2, round(FULL_STEPS * share_of_budget(settings)))
        flags += ["--training.max_steps", str(steps), "--evaluation.validation_limit", "500"]
    if settings.budget is not None and settings.recipe == "modern":
        flags += shlex.split(_REDUCED_MODERN + (_REDUCED_MODERN_MNIST if settings.table == "mnist" else ""))
    elif settings.budget is not None:
        preset = _REDUCED_PRESET.get(settings.table, settings.table)
        flags += _REDUCED_FLAGS.get(settings.table, ())
    if settings.data.root is not None:
        flags += ["--data.root", settings.data.root]
    if unit.pool_size is not None:
        flags += ["--mining.pool", "separate", "--mining.pool_size", str(unit.pool_size)]
    flags += ["--method", unit.method, "--seed", str(unit.seed)]
    config = read_settings(RunSettings, ["--preset", preset, "--name", unit.name, *flags]).run_config
    # The test set is measured by the evaluation; the training's own look at it is kept short.
    short = config.evaluation.model_copy(update={"test": {"fgsm": EvaluationAttack(kind="fgsm")}})
    return config.model_copy(update={"evaluation": short})


def measures(settings: ReproduceSettings, unit: Unit) -> dict[str, Any]:
    """Settings of the evaluation (`EvaluateSettings`) of a run."""
    columns = {name: attack.model_dump() for name, attack in paper_columns(settings.table).attacks.items()}
    images: dict[str, Any] = {"curves": 0, "sparse": 0, "audit": 0}
    if settings.budget is not None:
        # Twenty restarts of PGD-100 cost as much as all other columns together, AutoAttack included.
        columns = {name: attack for name, attack in columns.items() if attack["num_restarts"] == 1}
        count = max(20, round(FULL_IMAGES * share_of_budget(settings)))
        images |= {"attacks": count, "autoattack": count, "representation": count, "bank": 10 * count}
    if unit.pool_size is not None:
        columns = {name: attack for name, attack in columns.items() if attack["num_restarts"] == 1}
        images |= {"autoattack": 0, "representation": 0}
    # Without attacks of their own the paper's are taken, transfer among them; their names are the table's columns.
    given = {} if settings.budget is None and unit.pool_size is None else {"attacks": columns}
    return {"model": unit.name, "images": images, "log": False, **given}
