"""Building blocks of settings: help with unit and range, fractions, errors that name their field, names for MLflow.

MLflow would refuse its names only after training.
"""

import math
import posixpath
import re
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from tla_service.errors import ConfigError

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


def _absolute(path: str) -> str:
    """A path that stays the same on Ray's workers, whose working directories are others; `~` is each node's own."""
    return path if "://" in path or path.startswith(("/", "~")) else str(Path.cwd() / path)


DataPath = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]


def _key(name: str) -> str:
    """A name by MLflow's rules for keys (mlflow.utils.validation)."""
    if not re.fullmatch(r"[/\w.\- :]*", name):
        raise PydanticCustomError("name", "has more than the letters, digits, spaces and _ - . : / that MLflow allows")
    if posixpath.normpath(name) != name or name.startswith((".", "/")):
        raise PydanticCustomError("name", "not normalized, as a/b is, and MLflow treats names as paths")
    return name


def _tag(name: str) -> str:
    if name.startswith("tla."):
        raise PydanticCustomError("name", "tags that begin with tla. are set by the run itself")
    return _key(name)


def _model(name: str) -> str:
    # "/" and ":" are reserved by MLflow; "@" precedes an alias, and the others have a meaning in its filters.
    found = re.search(r"[/:@'\"`%\\#?]", name)
    if found is not None:
        raise PydanticCustomError("name", "a registered model's name cannot contain {found}", {"found": found[0]})
    if not name.isprintable() or name.strip() != name or name == "." or name.startswith(".."):
        raise PydanticCustomError("name", "not a valid name of a registered model")
    if name.startswith("m-"):
        raise PydanticCustomError("name", "names that begin with m- are model ids in MLflow")
    return name


def _experiment(name: str) -> str:
    if not name.isprintable() or not name.strip():
        raise PydanticCustomError("name", "not a printable name")
    return name


# Names for MLflow, with the lengths of its columns. Names of attacks are parts of keys; tags are parameters, too; the
# promotion lock of a model is a registered model with a longer name.
AttackName = Annotated[str, Field(max_length=150), AfterValidator(_key)]
TagName = Annotated[str, Field(max_length=250 - len("tracking.tags.")), AfterValidator(_tag)]
TagValue = Annotated[str, Field(max_length=8000)]
ModelName = Annotated[str, Field(max_length=200), AfterValidator(_model)]
ExperimentName = Annotated[str, Field(max_length=256), AfterValidator(_experiment)]

# A function from outside the package.
Function = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")]


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

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: object, info: ValidationInfo) -> object:
        """Take the word of the help, none, and YAML's null for nothing where a value may be left out."""
        optional = type(None) in typing.get_args(cls.model_fields[str(info.field_name)].annotation)
        return None if optional and isinstance(value, str) and value.lower() in ("none", "null") else value


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_takes_bool, typing.get_args(annotation)))


def wrong(field: str, value: object, reason: str, remedy: str) -> PydanticCustomError:
    """A cross-field error that names its field itself, wherever pydantic raises it."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    context = {"field": field, "value": shown, "reason": reason, "remedy": remedy}
    return PydanticCustomError("cross_field", "{field}={value}: {reason}; {remedy}", context)


def refuse(*troubles: ConfigError | None) -> None:
    """Raise the first trouble, if there is any, as a cross-field error."""
    for trouble in filter(None, troubles):
        raise wrong(*trouble.args)
