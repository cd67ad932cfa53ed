"""Constraints on a point: comparisons of numbers and fields of the run, read from text and never run as code."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from tla_service.errors import ConfigError

_FIELD = "sweep.constraints"
_EXAMPLE = "write it like 'mining.pool_size >= 2 * training.global_batch_size'"
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip


class Constraint:
    """A comparison of arithmetic over fields of the run, such as `mining.pool_size <= 10 * training.global_batch_size`.

    Args:
        text: The comparison; `a < b < c` means both.

    Raises:
        ConfigError: The text is not one.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            tree: ast.expr | None = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError):
            tree = None
        if not isinstance(tree, ast.Compare):
            raise ConfigError(_FIELD, text, "not a comparison", _EXAMPLE)
        self._tree = tree

    def check(self, fields: Mapping[str, Any]) -> None:
        """Check that it can be computed on a run.

        Raises:
            ConfigError: It names a field that does not exist, or compares what cannot be compared.
        """
        try:
            self.holds(fields)
        except (TypeError, ZeroDivisionError) as error:
            raise ConfigError(_FIELD, self.text, f"cannot be computed ({error})", _EXAMPLE) from error

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Whether a run, as nested plain values, satisfies it."""
        left = self._value(self._tree.left, fields)
        for sign, node in zip(self._tree.ops, self._tree.comparators, strict=True):
            right = self._value(node, fields)
            if type(sign) not in _COMPARISONS:
                raise ConfigError(_FIELD, self.text, "uses a comparison other than < <= > >= == !=", _EXAMPLE)
            if not _COMPARISONS[type(sign)](left, right):
                return False
            left = right
        return True

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
        raise ConfigError(_FIELD, self.text, reason, _EXAMPLE)

    def _field(self, path: str, fields: Mapping[str, Any]) -> Any:
        value: Any = fields
        for name in path.split("."):
            if not (isinstance(value, Mapping) and name in value):
                raise ConfigError(_FIELD, self.text, f"the run has no field {path}", "see docs/configuration.md")
            value = value[name]
        return value
