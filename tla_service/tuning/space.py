"""The space of a sweep: checked before anything starts; points of it, and the runs that points stand for."""

import copy
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import ValidationError

from tla_service.config import RunConfig
from tla_service.config.explain import Explainer, validated
from tla_service.config.radii import known_shape
from tla_service.errors import ConfigError
from tla_service.tuning.axes import Axis, Constraint, axis_of, shown
from tla_service.tuning.settings import Dimension, SweepConfig

Point = dict[str, Any]
TRIES = 1000  # random points before a space counts as empty
MOST_GRID_POINTS = 100_000
_INSET = 0.01  # the ends of a range may be open
_BATCH = "training.global_batch_size"


class Space:
    """What a sweep searches around a run; raises ConfigError if an axis is wrong, or no point is allowed."""

    def __init__(self, run: RunConfig, sweep: SweepConfig) -> None:
        if isinstance(run.scaling.num_workers, tuple):
            reason = "runs whose number of workers changes do not compare"
            raise ConfigError("scaling.num_workers", list(run.scaling.num_workers), reason, "give one number, or auto")
        if run.scaling.async_validation:
            reason = "trials are decided by each epoch's validation, and share the cluster"
            raise ConfigError("scaling.async_validation", True, reason, "leave it out")
        self.run, self.sweep = run, sweep
        self.objectives = sweep.objectives or (run.selected_by,)
        self._full = run.model_dump(mode="json")
        self._fields = copy.deepcopy(self._full)
        # Evaluation attacks get what they would take from the training attack: all trials are measured alike.
        for where, attack in run.evaluation.attacks.items():
            fields = functools.reduce(dict.__getitem__, where.split(".", 2), self._fields)  # a name may have dots
            fields |= zip(("norm", "epsilon", "step_size"), attack.lengths(run.attack, run.data.name), strict=True)
        self.axes = tuple(axis_of(name, dimension) for name, dimension in (sweep.space or default_space(run)).items())
        self.constraints = tuple(Constraint(text) for text in sweep.constraints)
        for constraint in self.constraints:
            constraint.holds(self._fields)
        self._check_fields()
        self._check_sweep()
        for axis, value in self.ends():
            self.alone(axis, value)
        self._check_values()
        self._check_not_empty()

    @property
    def name(self) -> str:
        """The sweep's name: given, or derived from what identifies it, never from the time."""
        fields = self.sweep.model_dump(mode="json", exclude=self.sweep.NOT_IDENTITY)
        digest = hashlib.sha256(json.dumps([self.run.digest, fields], sort_keys=True).encode()).hexdigest()[:8]
        return self.sweep.name or f"{self.run.data.name}-{self.run.method}-sweep-{digest}"

    def apply(self, point: Point, *, full_length: bool = False) -> RunConfig:
        """The run of a point; with `full_length` as long as the run, and evaluated as it. Raises ConfigError.

        Learning rate and whatever is counted in optimizer steps follow the batch size and the length of a trial, so
        that every trial sees the same number of images.
        """
        values = {path: value for axis in self.axes for path, value in axis.fields(point[axis.name]).items()}
        fields = _with(self._full if full_length else self._fields, values)
        self._follow_batch_size(fields, None if full_length else self.sweep.trial_epochs)
        return _run_of(fields, partial(validated, RunConfig))

    def trial(self, number: int, point: Point, num_workers: int) -> RunConfig:
        """The run of a trial, named by its number and point: checkpoints under that name are of this point."""
        run = self.apply(point)
        # Trials queue for workers while others train, so no single trial may give up waiting.
        scaling = run.scaling.model_copy(update={"num_workers": num_workers, "wait_seconds": 0.0})
        digest = hashlib.sha256(key_of(point).encode()).hexdigest()[:6]
        return run.model_copy(update={"name": f"{self.name}-{number:04d}-{digest}", "scaling": scaling})

    def epochs(self, steps_per_epoch: int | None = None) -> int:
        """Epochs of a trial of the run's own settings, which `max_steps` may end first; checks ASHA's grace period."""
        sweep, training = self.sweep, self.run.training
        epochs = sweep.trial_epochs or training.epochs
        if training.max_steps is not None and steps_per_epoch is not None:
            epochs = min(epochs, math.ceil(training.max_steps * epochs / training.epochs / steps_per_epoch))
        if sweep.scheduler == "asha" and sweep.grace_epochs is not None and sweep.grace_epochs > epochs:
            reason = f"longer than a trial of {epochs} epochs"
            raise ConfigError("sweep.grace_epochs", sweep.grace_epochs, reason, "use fewer, or sweep.scheduler=none")
        return epochs

    def allows(self, point: Point) -> bool:
        """Whether the point's run is valid and satisfies all constraints."""
        return self._refusal(point, self.constraints) is None

    def ends(self, inset: float = 0.0) -> list[tuple[Axis, Any]]:
        """Each axis with each of its `ends`."""
        return [(axis, value) for axis in self.axes for value in axis.ends(inset)]

    def alone(self, axis: Axis, value: Any) -> RunConfig | None:
        """The run with one axis at a value, all else as it was; None if these do not go together, else ConfigError."""
        try:
            return _run_of(_with(self._fields, axis.fields(value)), RunConfig.model_validate)
        except ValidationError as error:
            found = next((one for one in error.errors(include_url=False) if one["type"] != "cross_field"), None)
            if found is None:
                return None
            wrong = Explainer(RunConfig, "").explain(found)
            raise ConfigError(f"sweep.space.{axis.name}", value, wrong.reason, wrong.remedy) from error

    def own_point(self) -> Point | None:
        """The run's own settings as a point; None if they lie outside the space, or match no single variant."""
        point: Point = {}
        for axis in self.axes:
            names = axis.choices if axis.variants is not None else (_get(self._fields, axis.name),)
            same = [name for name in names if all(_get(self._fields, p) == v for p, v in axis.fields(name).items())]
            if len(same) != 1 or not axis.holds(same[0]):
                return None
            point[axis.name] = same[0]
        return point if self.allows(point) else None

    def random(self, rng: np.random.Generator, tried: Collection[str] = ()) -> Point | None:
        """An allowed random point whose key is not among those tried; None if `TRIES` draws give none."""
        draws = itertools.islice(self._draws(rng), TRIES)
        return next((point for point in draws if key_of(point) not in tried and self.allows(point)), None)

    def grid(self) -> list[Point]:
        """All allowed points, the last axis changing first."""
        names, values = [axis.name for axis in self.axes], itertools.product(*(axis.choices for axis in self.axes))
        points = (dict(zip(names, each, strict=True)) for each in values)
        return [point for point in points if self.allows(point)]

    def _draws(self, rng: np.random.Generator) -> Iterator[Point]:
        while True:
            yield {axis.name: axis.draw(rng) for axis in self.axes}

    def _refusal(self, point: Point, constraints: Sequence[Constraint]) -> str | None:
        """What is wrong with a point, if anything is."""
        try:
            run = self.apply(point)
            trouble = run.attack_trouble(known_shape(run.data.name, run.data.image_size))
            if trouble is not None:
                return str(trouble)
            fields = run.model_dump(mode="json")
            return next((constraint.text for constraint in constraints if not constraint.holds(fields)), None)
        except ConfigError as error:  # of a constraint too, such as a division by zero here
            return str(error)

    def _check_fields(self) -> None:
        """No two axes set one field; and a radius counts in one norm only, so what changes the norm brings lengths."""
        owners, norm = dict[str, str](), self.run.attack.norm
        for axis, value in self.ends():
            fields, where = axis.fields(value), f"sweep.space.{axis.name}"
            for path in fields:
                owner = owners.setdefault(path, axis.name)
                if owner != axis.name:
                    raise ConfigError(where, None, f"{path} is set by {owner} too", "let one of them set it")
            if fields.get("attack.norm", norm) != norm and not {*fields} >= {"attack.epsilon", "attack.step_size"}:
                reason = f"attack.epsilon and attack.step_size are in {norm}"
                remedy = "use variants that set attack.norm, attack.epsilon and attack.step_size together"
                raise ConfigError(where, shown(value), reason, remedy)

    def _check_sweep(self) -> None:
        sweep = self.sweep
        if sweep.searcher == "grid":
            ranges = [axis.name for axis in self.axes if not axis.choices]
            if ranges:
                raise ConfigError(f"sweep.space.{ranges[0]}", None, "a grid needs a list of values", "give one")
            size = math.prod(len(axis.choices) for axis in self.axes)
            if size > MOST_GRID_POINTS:
                remedy = "use sweep.searcher=random or tpe"
                raise ConfigError("sweep.searcher", "grid", f"{size} points are too many", remedy)
        if sweep.picture and not self.axes[0].choices:
            reason = f"its x axis is the first of the space, and {self.axes[0].name} is a range"
            raise ConfigError("sweep.picture", sweep.picture, reason, "give that a list of values, or no picture")
        if sweep.measure_test and (sweep.searcher != "grid" or sweep.scheduler != "none"):
            remedy = "use it with sweep.searcher=grid and sweep.scheduler=none"
            raise ConfigError("sweep.measure_test", True, "test images would take part in a search", remedy)
        if self.run.scaling.wait_seconds > 0 and sweep.max_concurrent is None:
            reason = "with scaling.wait_seconds the cluster may grow, so its present size sets no limit"
            raise ConfigError("sweep.max_concurrent", None, reason, "set it to the trials that may run at a time")
        searched = {path for axis, value in self.ends() for path in axis.fields(value)}
        if sweep.trial_epochs is not None and "training.epochs" in searched:
            reason = "all trials have this length, and the space has training.epochs"
            raise ConfigError("sweep.trial_epochs", sweep.trial_epochs, reason, "leave out one of them")
        self.epochs()

    def _check_values(self) -> None:
        """Refuse a choice, a radius or a step that no point can have: it would be left out of the search silently."""
        rng = np.random.default_rng(self.sweep.seed)
        for axis, value in self.ends(_INSET):
            is_choice = bool(self.sweep.space and axis.choices)
            if not (is_choice or any(path.startswith("attack.") for path in axis.fields(value))):
                continue
            trouble: str | None = None
            for point in itertools.islice(self._draws(rng), TRIES):
                trouble = self._refusal(point | {axis.name: value}, ())
                if trouble is None:
                    break
            else:
                reason = f"no point can have this value ({trouble})"
                raise ConfigError(f"sweep.space.{axis.name}", shown(value), reason, "correct it, or leave it out")

    def _check_not_empty(self) -> None:
        rng = np.random.default_rng(self.sweep.seed)
        if self.sweep.searcher == "grid":
            found, how = bool(self.grid()), "no point of the grid is allowed"
        else:
            found, how = self.random(rng) is not None, f"none of {TRIES} random points is allowed"
        if not found:
            example = next(self._draws(np.random.default_rng(self.sweep.seed)))
            reason = f"{how}; {shown(example)} breaks: {self._refusal(example, self.constraints)}"
            subject = "sweep.constraints" if self.constraints else "sweep.space"
            raise ConfigError(subject, None, reason, "widen the space, or drop a constraint")

    def _follow_batch_size(self, fields: dict[str, Any], trial_epochs: int | None) -> None:
        training, schedule = fields["training"], fields["schedule"]
        ratio = training["global_batch_size"] / self.run.training.global_batch_size
        power = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[self.sweep.learning_rate_rule]
        fields["optimizer"]["learning_rate"] *= ratio**power
        epochs = trial_epochs or training["epochs"]
        shorter = epochs / training["epochs"]
        training["epochs"] = epochs
        if training["max_steps"] is not None:
            training["max_steps"] = max(1, round(training["max_steps"] * shorter / ratio))
        scale = shorter / ratio if schedule["unit"] == "step" else shorter
        schedule["warmup"] *= scale
        # Two that meet stay two: the rate falls as often as in the run.
        schedule["milestones"] = [max(1, round(milestone * scale)) for milestone in schedule["milestones"]]


def _run_of(fields: dict[str, Any], validate: Callable[[dict[str, Any]], RunConfig]) -> RunConfig:
    """A run with `model.code` only if it uses any: points that do not are those that own code is compared with."""
    code = fields["model"].pop("code")
    run = validate(fields)
    if code is None or not run.uses_own_code:
        return run
    return run.model_copy(update={"model": run.model.model_copy(update={"code": code})})


def key_of(point: Point) -> str:
    """A point as text: equal points, equal text."""
    return json.dumps(point, sort_keys=True)


def default_space(run: RunConfig) -> dict[str, Dimension]:
    """The paper's weights and margin over wide ranges, and sizes around the run's own."""
    batch, pool = run.training.global_batch_size, run.mining.pool_size
    space = {_BATCH: Dimension(values=(max(2, batch // 2), batch, 2 * batch))}
    if run.mines_triplets:
        space |= {
            "loss.triplet_weight": Dimension(low=0.1, high=8, log=True),
            "loss.norm_weight": Dimension(low=1e-5, high=1e-2, log=True),
            "loss.margin": Dimension(low=0.005, high=0.2),
        }
        if run.mining.pool == "separate":
            space["mining.pool_size"] = Dimension(values=(max(1, pool // 2), pool, 2 * pool, 4 * pool))
    return space


def _with(fields: dict[str, Any], values: Any) -> dict[str, Any]:
    """A copy of nested fields with some replaced, by their paths."""
    copied = copy.deepcopy(fields)
    for path, value in values.items():
        *sections, name = path.split(".")
        functools.reduce(dict.__getitem__, sections, copied)[name] = value
    return copied


def _get(fields: dict[str, Any], path: str) -> Any:
    return functools.reduce(dict.__getitem__, path.split("."), fields)
