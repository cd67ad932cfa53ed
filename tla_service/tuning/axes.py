"""What a sweep may try: searched settings with their values, and constraints that a point must satisfy."""

import ast
import itertools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tla_service.config import RunConfig
from tla_service.config.explain import suggest
from tla_service.errors import ConfigError
from tla_service.tuning.settings import Dimension

# What shapes how a trial is measured, or where it runs: searching it would compare different things.
_FIXED = (
    "name", "scaling", "tracking", "evaluation", "model.code", "data.name", "data.root", "data.train",
    "data.validation", "data.test", "data.validation_fraction", "data.test_fraction",
)  # fmt: skip
# Of the table of trials, beside the axes and the accuracies.
COLUMNS = ("trial", "status", "best_epoch", "epochs", "attempts", "restarts", "seconds", "reason")
_CONSTRAINTS = "sweep.constraints"
_EXAMPLE = "write it like 'mining.pool_size >= 2 * training.global_batch_size'"
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """A searched setting, checked: a range, or choices."""

    name: str  # field of the run, or name of a group of variants
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # draws are uniform on a log scale
    whole: bool = False  # values are integers
    choices: tuple[Any, ...] = ()  # values, or names of variants
    variants: Mapping[str, Mapping[str, Any]] | None = None  # fields that each variant sets

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value."""
        if self.choices:
            return self.choices[int(rng.integers(len(self.choices)))]
        if self.whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else float(value)

    def fields(self, value: Any) -> Mapping[str, Any]:
        """The fields of the run that a value of this axis sets."""
        return self.variants[value] if self.variants is not None else {self.name: value}

    def holds(self, value: Any) -> bool:
        """Whether a value lies on this axis."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high  # not None, where a field is optional

    def ends(self, inset: float = 0.0) -> tuple[Any, ...]:
        """All choices, or the ends of the range; a range of reals is shortened by a fraction at both."""
        if self.choices:
            return self.choices
        if self.whole:
            return (int(self.low), int(self.high))
        reach = inset * (self.high - self.low)
        return (self.low + reach, self.high - reach)


def axis_of(name: str, dimension: Dimension) -> Axis:
    """The axis of a field of the run, or of a group of variants; raises ConfigError if it cannot be searched so."""
    where, low, high = f"sweep.space.{name}", dimension.low, dimension.high
    if sum([(low, high) != (None, None), dimension.values is not None, dimension.variants is not None]) != 1:
        raise ConfigError(where, None, "needs one of: low and high; values; variants", "give exactly one of them")
    if dimension.variants is not None:
        if name in COLUMNS or name.startswith(("validation/", "test/")):
            raise ConfigError(where, None, "the table of trials has a column of this name", "give the group another")
        _check_some(where, dimension.variants)
        variants = {
            variant: {path: _as_field(_field(path, where), value) for path, value in fields.items()}
            for variant, fields in dimension.variants.items()
        }
        return Axis(name, choices=tuple(variants), variants=variants)
    field = _field(name, where)
    if dimension.values is not None:
        values = tuple(_as_field(field, value) for value in dimension.values)
        _check_some(where, values)
        return Axis(name, choices=values)
    whole = not _is_number(field.annotation, float)
    if whole and not _is_number(field.annotation, int):
        raise ConfigError(where, None, "is not a number, so it has no range", "give a list of values")
    if low is None or high is None:
        raise ConfigError(where, None, "a range has a low and a high end", "give both")
    if low >= high:
        raise ConfigError(f"{where}.low", f"{low:g}", f"not below high={high:g}", "swap them, or give a list of values")
    if dimension.log and low <= 0:
        raise ConfigError(f"{where}.low", f"{low:g}", "a logarithmic scale has no zero", "use a low end above 0")
    return Axis(name, low=low, high=high, log=dimension.log, whole=whole)


def _check_some(where: str, given: Any) -> None:
    if len(given) == 0:
        raise ConfigError(where, "[]", "no values to choose from", "give at least one")
    if isinstance(given, tuple) and len({repr(value) for value in given}) < len(given):
        raise ConfigError(where, shown(given), "a value is in it twice", "give each once")


def _as_field(field: FieldInfo, value: Any) -> Any:
    """A value as the run has it: 8/255 and 1e-3 are text in a file. `Space` explains what is wrong with it."""
    annotated: Any = typing.Annotated[field.annotation, field]
    adapter = TypeAdapter(annotated)
    try:
        return value if isinstance(value, bool) else adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError:
        return value


def _field(path: str, where: str) -> FieldInfo:
    if any(path == fixed or path.startswith(f"{fixed}.") for fixed in _FIXED):
        raise ConfigError(where, None, f"{path} must be the same for all trials", "set it for the run instead")
    section: Any = RunConfig
    field: FieldInfo | None = None
    for name in path.split("."):
        field = getattr(section, "model_fields", {}).get(name)
        if field is None:
            raise ConfigError(where, None, f"the run has no field {path}", suggest(path, list(_paths(RunConfig))))
        section = field.annotation
    if hasattr(section, "model_fields"):
        raise ConfigError(where, None, "is a section", f"search a field of it: {', '.join(section.model_fields)}")
    assert field is not None
    return field


def _paths(section: Any, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _paths(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_number(annotation: Any, kind: type) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return any(_is_number(member, kind) for member in typing.get_args(annotation))
    return annotation is kind


def shown(value: Any) -> str:
    """A value as text, or a point's values with their names."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={shown(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Constraint:
    """A comparison (`a < b < c` means both) of arithmetic over numbers and fields of the run, never run as code."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            tree: ast.expr | None = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError):
            tree = None
        if not isinstance(tree, ast.Compare):
            raise ConfigError(_CONSTRAINTS, text, "not a comparison", _EXAMPLE)
        self._tree = tree

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Whether a run, as nested plain values, satisfies it; ConfigError if that cannot be computed of its fields."""
        try:
            return self._compare(fields)
        except (TypeError, ZeroDivisionError) as error:
            raise ConfigError(_CONSTRAINTS, self.text, f"cannot be computed ({error})", _EXAMPLE) from error

    def _compare(self, fields: Mapping[str, Any]) -> bool:
        tree = self._tree
        if not all(type(sign) in _COMPARISONS for sign in tree.ops):
            raise ConfigError(_CONSTRAINTS, self.text, "uses a comparison other than < <= > >= == !=", _EXAMPLE)
        # All of them: a wrong field behind a false comparison would else be found in the middle of a search.
        pairs = itertools.pairwise([self._value(node, fields) for node in (tree.left, *tree.comparators)])
        return all(_COMPARISONS[type(sign)](*pair) for sign, pair in zip(tree.ops, pairs, strict=True))

    def _value(self, node: ast.expr, fields: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub()):
                return -self._value(node.operand, fields)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return _ARITHMETIC[type(node.op)](self._value(node.left, fields), self._value(node.right, fields))
            case ast.Name() | ast.Attribute():
                return self._field(ast.unparse(node), fields)
        reason = f"'{ast.unparse(node)}' is not a number, a field or + - * / of them"
        raise ConfigError(_CONSTRAINTS, self.text, reason, _EXAMPLE)

    def _field(self, path: str, fields: Mapping[str, Any]) -> Any:
        value: Any = fields
        for name in path.split("."):
            if not (isinstance(value, Mapping) and name in value):
                raise ConfigError(_CONSTRAINTS, self.text, f"the run has no field {path}", "see docs/configuration.md")
            value = value[name]
        return math.nan if value is None else value  # compares with nothing, but is no error
