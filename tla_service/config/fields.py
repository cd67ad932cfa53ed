"""Building blocks of settings: help with unit and range, fractions, errors that name their field, names for MLflow.

MLflow would refuse its names only after training.
"""

import math
import posixpath
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from tla_service.errors import ConfigError

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
# MLflow's rules for keys (mlflow.utils.validation), and the lengths of its columns.
_KEY = re.compile(r"[/\w.\- :]*")
_KEY_RULE = "MLflow allows letters, digits, spaces and _ - . : / in names"
_KEY_LENGTH, _TAG_LENGTH, _EXPERIMENT_LENGTH = 250, 8000, 256
_ATTACK_LENGTH = 150  # attack names are parts of keys
_MODEL_LENGTH = 200  # the promotion lock of a model is a registered model with a longer name
# "/" and ":" are reserved by MLflow; "@" precedes an alias, and the others have a meaning in its filters.
_NOT_IN_MODELS = re.compile(r"[/:@'\"`%\\#?]")
_OURS = "tla."


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


def attack_trouble(section: str, names: Iterable[str], taken: Sequence[str] = ("worst",)) -> ConfigError | None:
    """What is wrong with the names of attacks, which become names of metrics, parameters and tags."""
    for name in names:
        field = f"{section}.{name}"
        if name in taken:
            return ConfigError(field, name, "this name is reserved", "rename the attack")
        reason = _key_trouble(name, _ATTACK_LENGTH)
        if reason:
            return ConfigError(section, name, reason, "rename the attack, to pgd20 for example")
    return None


def model_trouble(field: str, name: str) -> ConfigError | None:
    """What is wrong with the name of a registered model."""
    found = _NOT_IN_MODELS.search(name)
    if found is not None:
        reason = f"a registered model's name cannot contain {found[0]}"
        return ConfigError(field, name, reason, "leave it out, or use -")
    if not name.isprintable() or name.strip() != name or name == "." or name.startswith(".."):
        return ConfigError(field, name, "not a valid name of a registered model", "use letters, digits, _ - .")
    if name.startswith("m-"):
        reason = "names that begin with m- are model ids in MLflow"
        return ConfigError(field, name, reason, "start it with something else")
    return _length_trouble(field, name, _MODEL_LENGTH)


def name_trouble(field: str, name: str) -> ConfigError | None:
    """What is wrong with the name of an experiment."""
    if not name.isprintable() or not name.strip():
        return ConfigError(field, name, "not a printable name", "use letters and digits")
    return _length_trouble(field, name, _EXPERIMENT_LENGTH)


def tag_trouble(field: str, key: str, value: str) -> ConfigError | None:
    """What is wrong with a tag of a run."""
    reason = _key_trouble(key, _KEY_LENGTH - len(field) - 1)  # also logged as a parameter of the run
    if reason:
        return ConfigError(field, key, reason, "rename the tag")
    if key.startswith(_OURS):
        return ConfigError(field, key, f"tags that begin with {_OURS} are set by the run itself", "rename the tag")
    return _length_trouble(f"{field}.{key}", value, _TAG_LENGTH)


def _key_trouble(name: str, most: int) -> str | None:
    if not _KEY.fullmatch(name):
        return _KEY_RULE
    if posixpath.normpath(name) != name or name.startswith((".", "/")):
        return "MLflow treats names as paths, and this one is not normalized"
    return f"longer than {most} characters" if len(name) > most else None


def _length_trouble(field: str, value: str, most: int) -> ConfigError | None:
    if len(value) <= most:
        return None
    return ConfigError(field, f"{value[:30]}...", f"{len(value)} characters, MLflow allows {most}", "shorten it")
