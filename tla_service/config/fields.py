"""Building blocks of settings: help with unit and range, fractions, and errors that name their field."""

import math
import typing
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def parse_fraction(value: object) -> object:
    """Turn "8/255" into 8/255 without evaluating anything; leave every other value to pydantic."""
    if isinstance(value, str) and "/" in value:
        try:
            numerator, denominator = map(float, value.split("/"))
            quotient = numerator / denominator
        except (ValueError, ZeroDivisionError):
            quotient = math.nan
        if not math.isfinite(quotient):
            raise PydanticCustomError("fraction", "not a fraction of two numbers; write it like 8/255")
        return quotient
    return value


Pixels = Annotated[float, BeforeValidator(parse_fraction, json_schema_input_type=float | str)]


def setting(default: Any, text: str, *, unit: str = "", **constraints: Any) -> Any:
    """A field whose help names its unit and range, taken from the constraints that validate it."""
    bounds = " and ".join(f"{sign} {constraints[key]}" for key, sign in _SIGNS.items() if key in constraints)
    facts = ", ".join(filter(None, (unit, bounds)))
    return Field(default, description=f"{text} [{facts}]" if facts else text, **constraints)


class Section(BaseModel):
    """A frozen group of settings; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `true` (and YAML's `yes`, `on`) for a number: pydantic would take it for 1."""
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("bool_as_value", "true and false are not valid here")
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_takes_bool, typing.get_args(annotation)))


class Trouble(NamedTuple):
    """What is wrong with a field: the arguments of a ConfigError."""

    field: str
    value: str
    reason: str
    remedy: str


def wrong(field: str, value: object, reason: str, remedy: str) -> PydanticCustomError:
    """A cross-field error that names its field itself, wherever pydantic raises it."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    context = {"field": field, "value": shown, "reason": reason, "remedy": remedy}
    return PydanticCustomError("cross_field", "{field}={value}: {reason}; {remedy}", context)
