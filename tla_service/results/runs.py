"""The runs of a table, a grid with one axis, and their results: means with intervals, compared seed by seed."""

import math
import shlex
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tla_service.config import TRIPLET_METHODS, RunConfig
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.loading import RunSettings, read_settings
from tla_service.config.yaml_files import read_yaml
from tla_service.errors import UnavailableError
from tla_service.evaluation.paper import paper_columns
from tla_service.evaluation.results import CONFIDENCE, BoolArray, paired_difference
from tla_service.evaluation.shards import load_outcome, standing_under_all
from tla_service.files import write_whole
from tla_service.report.schema import AUTOATTACK_FILE, OUTCOME_FILE, REPORT_FILE, Report, read_report
from tla_service.results import tuned
from tla_service.results.settings import RECIPE_METHODS, ReproduceSettings
from tla_service.training.checkpoint import MANIFEST, keep_best_only
from tla_service.training.meter import ROBUST
from tla_service.training.output import SUMMARY, write_summary
from tla_service.tuning.settings import Dimension, SweepConfig
from tla_service.tuning.space import Space

AXIS, REPORT, AUTOATTACK = "run", "report", "autoattack"
# The reduced settings at full length: minutes on two cores; smaller budgets scale steps and images down.
FULL_MINUTES = {"paper": 120.0, "modern": 45.0}
FULL_STEPS, FULL_IMAGES = 430, 1000
_REDUCED_PRESET = {"mnist": "mnist_small", "digits": "digits"}
# The paper's networks are too large for a CPU; this one is not, and learns CIFAR-10 poorly. The page says so.
_REDUCED = "--model.name small_cnn --training.global_batch_size 256"
_REDUCED_PAPER = dict.fromkeys(("cifar10", "tiny_imagenet"), f"{_REDUCED} --mining.pool batch ")
# In so few steps: a learning rate that rises and falls once, and averages over ten steps instead of a thousand (0.9
# was better than 0.98 for all three methods, on validation).
_REDUCED_MODERN = (
    f"{_REDUCED} --training.epochs 2 --training.ema_decay 0.9 --no-training.channels_last --schedule.name cyclic "
    "--schedule.warmup 0 --evaluation.every_epochs 1 "
)
# As in the paper's reduced recipe: what learns at this radius in so few steps.
_REDUCED_MODERN_MNIST = (
    "--attack.step_size 0.075 --attack.num_steps 7 --attack.warmup 0.5 --optimizer.learning_rate 0.01 "
    "--evaluation.validation.step_size 0.03 --evaluation.validation.num_steps 20"
)
# TRADES' weight on MNIST (Zhang et al. 2019, section 5.3.1).
_MODERN_FIELDS: dict[tuple[str, str], dict[str, Any]] = {("mnist", "trades"): {"loss.robust_weight": 1.0}}


@dataclass(frozen=True)
class TableRun:
    """One run of a table: trained, then measured."""

    name: str  # also of its folder
    method: str
    seed: int
    surrogate: str | None = None  # run that transfer attacks are crafted on: the same method with the next seed
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)  # settings of its own
    is_trial: bool = False  # of a search: trained, and compared on validation images only
    images: Mapping[str, int] = field(default_factory=dict, hash=False)  # by measurement, where it differs

    @property
    def row(self) -> str:
        """The row of the table that it belongs to: its method, or its arm of the protocol."""
        return self.name.rpartition("-s")[0]


def rounds(settings: ReproduceSettings, state: Path) -> Iterator[list[TableRun]]:
    """The runs of the table, in rounds of which each may depend on the results of those before it."""
    if settings.recipe == "tuned":
        found = tuned.protocol(settings.table)
        for trials in (tuned.first_trials(settings.table), tuned.repeated_trials(settings.table, state)):
            runs = []
            for name, arm, seed, point in trials:
                fields = {**found.trial_fields, **found.arms[arm].fields, **point}
                runs.append(TableRun(name, found.arms[arm].method, seed, fields=fields, is_trial=True))
            yield runs
    yield table_runs(settings, state)


def table_runs(settings: ReproduceSettings, state: Path | None = None) -> list[TableRun]:
    """The runs that the table shows, seed by seed, so that an unfinished table has every method.

    Tuned ones have the settings of their searches' winners in the state folder, none without it.
    """
    if settings.recipe == "tuned":
        return _tuned_runs(settings, state)
    seeds = settings.num_seeds
    has_transfer = seeds > 1 and settings.budget is None
    return [
        TableRun(f"{method}-s{seed}", method, seed, f"{method}-s{(seed + 1) % seeds}" if has_transfer else None)
        for seed in range(seeds)
        for method in settings.methods or RECIPE_METHODS[settings.recipe]
    ]


def _tuned_runs(settings: ReproduceSettings, state: Path | None) -> list[TableRun]:
    found = tuned.protocol(settings.table)
    points = {}
    for name, arm in found.arms.items():
        points[name] = {} if state is None else tuned.winner(settings.table, arm.tuned_as or name, state).point
    runs = []
    for seed in range(settings.num_seeds):
        for name, arm in found.arms.items():
            images = {} if seed < found.full_seeds else {"autoattack": 0, "representation": 0}
            images |= {} if arm.autoattack else {"autoattack": 0}
            if arm.seeds is None or seed < arm.seeds:
                fields = {**points[name], **arm.fields}
                runs.append(TableRun(f"{name}-s{seed}", arm.method, seed, fields=fields, images=found.images | images))
    # First the seeds of one measurement, of every arm; then the arms with AutoAttack, which takes the longest.
    return sorted(runs, key=lambda run: (run.seed < found.full_seeds, -run.images["autoattack"], -run.seed))


def share_of_budget(settings: ReproduceSettings) -> float:
    """The fraction of the reduced settings' full length that the budget allows, at most 1."""
    full = FULL_MINUTES[settings.recipe]
    return min(1.0, (settings.budget or full) / full)


def table_space(settings: ReproduceSettings, runs: Sequence[TableRun], **sweep: Any) -> Space:
    """The grid of some runs of the table, with further settings of the sweep."""
    variants = {}
    for run in runs:
        modern = _MODERN_FIELDS.get((settings.table, run.method), {}) if settings.recipe == "modern" else {}
        if settings.recipe == "modern" and run.method not in TRIPLET_METHODS:
            modern = {"loss.robust_term": "auto", **modern}  # the preset's is that of TLA
        variants[run.name] = {"method": run.method, "seed": run.seed, **modern, **run.fields}
    searches = f"-{tuned.searches_digest(settings.table)}" if settings.recipe == "tuned" else ""
    grid = SweepConfig(
        name=f"{settings.table}-{settings.budget_name}{searches}",  # also of the folder that a cluster's trials are in
        space={AXIS: Dimension(variants=variants)},
        searcher="grid",
        scheduler="none",
        measure_test=True,
        failures_in_a_row=len(variants) + 1,
        max_concurrent=settings.side_by_side,
        **sweep,
    )
    return Space(_shared(settings), grid)


def run_config(space: Space, run: TableRun) -> RunConfig:
    """The configuration of one run of the grid."""
    return space.apply({AXIS: run.name}, full_length=True).model_copy(update={"name": run.name})


def _shared(settings: ReproduceSettings) -> RunConfig:
    """What all runs have in common: the preset, shortened if there is a budget."""
    flags: list[str] = []
    preset = settings.table if settings.recipe == "paper" else f"modern_{settings.table}"
    if settings.recipe == "tuned":
        found = tuned.protocol(settings.table)
        preset, flags = found.preset, [*found.flags]
    elif settings.budget is not None:
        steps = max(2, round(FULL_STEPS * share_of_budget(settings)))
        flags += ["--training.max_steps", str(steps), "--evaluation.validation_limit", "500"]
        if settings.recipe == "modern":
            flags += shlex.split(_REDUCED_MODERN + (_REDUCED_MODERN_MNIST if settings.table == "mnist" else ""))
        else:
            preset = _REDUCED_PRESET.get(settings.table, settings.table)
            flags += shlex.split(_REDUCED_PAPER.get(settings.table, ""))
    if settings.data.root is not None:
        flags += ["--data.root", settings.data.root]
    config = read_settings(RunSettings, ["--preset", preset, *flags]).run_config
    # The evaluation measures the test set; the training's own test is kept short.
    short = config.evaluation.model_copy(update={"test": {"fgsm": EvaluationAttack(kind="fgsm")}})
    # More workers mine negatives in smaller shares of the batch: a run has one unless told otherwise.
    workers = 1 if settings.scaling.num_workers == "auto" else settings.scaling.num_workers
    scaling = settings.scaling.model_copy(update={"num_workers": workers})
    return config.model_copy(update={"evaluation": short, "scaling": scaling, "tracking": settings.tracking})


def write_report_settings(settings: ReproduceSettings, run: TableRun, state: Path) -> Path:
    """Write the settings of a trained run's evaluation (`ReportSettings`) to a file in its folder, and return it."""
    left_out = ("adaptive", "curves", "sparse", "certified", "corruptions", "audit", "transfer", "adversarial")
    folder, images = state / run.name, dict.fromkeys(left_out, 0)
    fields: dict[str, Any] = {"model": str(checkpoint_of(folder)), "output": str(folder / REPORT), "page": False}
    fields |= {"images": images, "data": {"root": settings.data.root}}
    if run.surrogate is not None:
        fields["surrogate"] = str(checkpoint_of(state / run.surrogate))
    if settings.recipe == "tuned":
        images |= run.images
        attacks = tuned.protocol(settings.table).attacks
        fields["attacks"] = {name: attack.model_dump() for name, attack in attacks.items()}
    elif settings.budget is not None:
        count = max(20, round(FULL_IMAGES * share_of_budget(settings)))
        images |= {"attacks": count, "autoattack": count, "representation": count, "bank": 10 * count}
        # Twenty restarts of PGD-100 cost as much as all other columns together, AutoAttack included. Without attacks
        # of its own an evaluation takes the paper's, transfer attacks included.
        columns = {name: attack.model_dump() for name, attack in paper_columns(settings.table).attacks.items()}
        fields["attacks"] = {name: attack for name, attack in columns.items() if attack["num_restarts"] == 1}
    path = folder / "report.yaml"
    if path.exists() and read_yaml(path, "state").get("surrogate") != fields.get("surrogate"):
        shutil.rmtree(folder / REPORT, ignore_errors=True)  # of another number of seeds, unfinished
    write_whole(path, yaml.safe_dump(fields, sort_keys=False))
    return path


def checkpoint_of(folder: Path) -> Path:
    """The newest checkpoint of a trained run; raises UnavailableError if there is none."""
    found = sorted(path.parent for path in (folder / "checkpoints").glob(f"*/{MANIFEST}"))
    if not found:
        raise UnavailableError("state", folder, "has no checkpoint", "delete the folder to train the run again")
    return found[-1]


def slim(folder: Path) -> None:
    """Keep only the best weights and the report of a run, so that the state is small enough to copy.

    Shards of an evaluation that has not finished are kept: it resumes from them.
    """
    newest = checkpoint_of(folder)
    for old in set(newest.parent.glob("step-*")) - {newest}:
        shutil.rmtree(old)
    keep_best_only(newest)
    if (folder / REPORT / REPORT_FILE).exists():
        shutil.rmtree(folder / REPORT / "shards", ignore_errors=True)


def record_if_diverged(folder: Path, reason: object) -> bool:
    """Score a trial as one that withstands nothing if its loss was not finite; any other failure is to be repeated."""
    has_diverged = "the loss is not finite" in str(reason)
    if has_diverged:
        folder.mkdir(parents=True, exist_ok=True)  # a trial on a cluster has left nothing there
        write_summary(folder, {"status": "failed", "validation": {ROBUST: 0.0}})
    return has_diverged


def is_trained(folder: Path) -> bool:
    """Whether the run in the folder has been trained."""
    return (folder / SUMMARY).exists()


def is_finished(run: TableRun, state: Path) -> bool:
    """Whether a run has been trained and, unless it is a trial, measured."""
    return is_trained(state / run.name) if run.is_trial else (state / run.name / REPORT / REPORT_FILE).exists()


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, over seeds or over the images of the only one."""

    value: float
    low: float
    high: float

    @classmethod
    def over_seeds(cls, values: Sequence[float]) -> "Estimate | None":
        """With Student's t interval; of one seed there is no interval, of none nothing."""
        if not values:
            return None
        mean = statistics.mean(values)
        if len(values) == 1:
            return cls(mean, math.nan, math.nan)
        from scipy.stats import t

        reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - reach, mean + reach)

    def text(self, digits: str = "+.1f", scale: int = 100) -> str:
        """The value with its interval, if there is one, in points unless another scale is given."""
        value, low, high = (f"{scale * each:{digits}}" for each in (self.value, self.low, self.high))
        return value if math.isnan(self.low) else f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Measured:
    """A finished run: its report, and whether each image is right when `clean`, under each attack, and all (N,)."""

    run: TableRun
    report: Report
    standing: Mapping[str, BoolArray]

    def figure(self, name: str) -> float | None:
        """A figure by name: an attack, `detection`, `neighbours clean`, `neighbours attacked`, `r EPS` or `r' EPS`.

        Accuracies are of all test images, as in the paper; the others leave out those set aside for the gate.
        """
        kind, _, rest = name.partition(" ")
        if kind == "detection":
            return None if self.report.detection is None else self.report.detection.auc
        if kind == "neighbours":
            votes = self.report.neighbours
            return None if votes is None else (votes.clean if rest == "clean" else votes.attacked).estimate
        if kind in ("r", "r'"):
            found = next((each for each in self.report.shift if f"{each.epsilon:.3g}" == rest), None)
            return None if found is None else found.r if kind == "r" else found.r_prime
        return float(self.standing[name].mean()) if name in self.standing else None


@dataclass(frozen=True)
class Row:
    """The finished runs of a method, in the order of their seeds."""

    label: str
    runs: tuple[Measured, ...]

    def values(self, name: str) -> list[float]:
        """A figure of each run, as fractions, without the runs that lack it."""
        return [value for each in self.runs if (value := each.figure(name)) is not None]

    def paired(self, other: "Row") -> list[tuple[Measured, Measured]]:
        """Pairs of runs with equal seeds, which share split, order and initial weights."""
        others = {each.run.seed: each for each in other.runs}
        return [(each, others[each.run.seed]) for each in self.runs if each.run.seed in others]

    def differences(self, other: "Row", name: str) -> list[float]:
        """The differences in a figure, seed by seed."""
        figures = [(first.figure(name), second.figure(name)) for first, second in self.paired(other)]
        return [first - second for first, second in figures if first is not None and second is not None]

    def minus(self, other: "Row", name: str) -> Estimate | None:
        """The mean difference; with one shared seed an accuracy's interval is over images (Newcombe's)."""
        pairs, values = self.paired(other), self.differences(other, name)
        if len(values) == len(pairs) == 1:
            one, two = (each.standing.get(name) for each in pairs[0])
            if one is not None and two is not None:
                found = paired_difference(one, two)
                return Estimate(found.difference, found.low, found.high)
        return Estimate.over_seeds(values)


def read_row(label: str, runs: Sequence[TableRun], state: Path) -> Row:
    """Read the finished ones of some runs."""
    found = []
    for run in runs:
        if not is_finished(run, state):
            continue
        folder = state / run.name / REPORT
        report = read_report(folder / REPORT_FILE)
        outcomes = [load_outcome(folder / AUTOATTACK_FILE)] if report.autoattack is not None else []
        outcomes.append(load_outcome(folder / OUTCOME_FILE))  # last: AutoAttack's `clean` is of fewer images
        standing = {name: outcome.standing(name) for outcome in outcomes for name in outcome.broken_at}
        standing["worst"] = standing_under_all(outcomes[-1])
        found.append(Measured(run, report, standing))
    return Row(label, tuple(found))
