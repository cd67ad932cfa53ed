"""What is wrong with a configuration, one line per error: field, value, reason, remedy."""

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tla_service.config.fields import Function
from tla_service.config.yaml_files import check_json
from tla_service.errors import ConfigError


class Explainer:
    """Explains errors in the terms of a settings class whose environment variables begin with a prefix."""

    def __init__(self, root: type[BaseModel], prefix: str) -> None:
        self._root, self._prefix = root, prefix

    def explain(self, error: ErrorDetails) -> ConfigError:
        """Explain a pydantic error."""
        context = error.get("ctx", {})
        if error["type"] == "cross_field":
            return ConfigError(context["field"], context["value"], context["reason"], context["remedy"])
        location, known = self._locate(error)
        name, value = ".".join(location), _shown(error["input"])
        if error["type"] == "extra_forbidden":
            parts = location[-1].split(".")
            if len(parts) > 1 and self._field_at([*location[:-1], *parts]) is not None:
                remedy = f"nest it, as in {': {'.join(parts)}: ...{'}' * (len(parts) - 1)}"
            else:
                remedy = suggest(location[-1], self._names_at(location[:-1]))
            return ConfigError(name, value, "no such setting", remedy)
        own = known is not None and Function in typing.get_args(known.annotation)
        if own and (choices := _literals(known.annotation)):  # each member of the union has its own error
            reason = f"not one of {', '.join(choices)}, and not module:function"
            return ConfigError(name, value, reason, suggest(str(value), choices))
        if error["type"] == "literal_error" and not (known is not None and _is_union(known.annotation)):
            choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
            return ConfigError(name, value, f"not one of {', '.join(choices)}", suggest(str(value), choices))
        reason = error["msg"][0].lower() + error["msg"][1:]
        section = self._section_at(location)
        if section is not None:
            return ConfigError(name, value, reason, f"write settings under it: {', '.join(section.model_fields)}")
        described = known.description if known is not None and known.description else "see --help"
        return ConfigError(name, value, reason, f"{_in_other_units(error, described)}expected: {described}")

    def explain_source(self, message: str, arguments: Sequence[str]) -> ConfigError:
        """Explain a complaint of pydantic-settings or its argument parser about these arguments."""
        # It does not say which variable of a section or a list is not JSON.
        for variable, path in self._variables():
            field = self._field_at(path)
            composite = field is not None and typing.get_origin(field.annotation) in (dict, tuple)
            if composite or self._section_at(path) is not None:
                try:
                    json.loads(os.environ[variable])
                except ValueError:
                    remedy = "write it as JSON, or set its fields one by one"
                    return ConfigError(variable, os.environ[variable], "not valid JSON", remedy)
        if of_mapping := re.search(r"Parsing error encountered for (\S+):", message):
            return ConfigError(of_mapping[1], None, "not of the form name=value", "write name=value, or JSON")
        if of_switch := re.search(r"argument --(\S+)/--no-\S+: ignored explicit argument '(.*)'", message):
            return _takes_no_value(of_switch[1], of_switch[2])
        unknown = re.search(r"unrecognized arguments: (--)?(\S+)", message)
        if unknown is None:
            return ConfigError("command line", None, message.removeprefix("error parsing CLI: "), "see --help")
        if not unknown[1] and (stray := self._stray(unknown[2], arguments)):
            return stray
        flag = unknown[2].split("=")[0]
        top = list(self._root.model_fields)
        flags = [*top, *(f"{name}.{field}" for name in top for field in self._names_at([name]))]
        close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
        remedy = f"did you mean --{close[0]}?" if close else "see --help"
        return ConfigError(f"{unknown[1] or ''}{flag}", None, "no such flag", remedy)

    def _stray(self, word: str, arguments: Sequence[str]) -> ConfigError | None:
        """A word that was meant for the flag before it, which takes no value, or all of them as one."""
        end = arguments.index(word) + 1 if word in arguments else 0
        start = max((place for place, each in enumerate(arguments[:end]) if each.startswith("--")), default=None)
        if start is None:
            return None
        name, _, first = arguments[start].removeprefix("--").removeprefix("no-").partition("=")
        annotation = getattr(self._field_at(name.split(".")), "annotation", None)
        if {annotation, *typing.get_args(annotation)} <= {bool, bool | None, type(None)} and annotation is not None:
            return _takes_no_value(name, word)
        if typing.get_origin(annotation) is tuple:
            value = ",".join(filter(None, (first, *arguments[start + 1 : end])))
            return ConfigError(name, None, "its values are separated by commas", f"write {value}")
        return None

    def check_variables(self, other: type[BaseModel]) -> None:
        """Refuse a variable that sets nothing, here or in `other`, or has a key twice: pydantic-settings takes both."""
        for variable, path in self._variables():
            check_json(variable, os.environ[variable])
            holders = [root for root in (self._root, other) if path[0] in root.model_fields]
            known = any(len(path) == 1 or Explainer(root, "")._section_at(path[:1]) is not None for root in holders)
            if not (known or path[0].startswith("test_")):
                remedy = "sections and fields are joined by two underscores, as in TLA_LOSS__MARGIN"
                raise ConfigError(variable, os.environ[variable], "no such setting", remedy)

    def _variables(self) -> list[tuple[str, list[str]]]:
        """Environment variables with the prefix, and the field that each sets as a path of names."""
        ours = [name for name in os.environ if name.upper().startswith(self._prefix)]
        return [(name, name[len(self._prefix) :].lower().split("__")) for name in ours]

    def _locate(self, error: ErrorDetails) -> tuple[list[str], Any]:
        """The field at fault, as a path of names and as pydantic knows it."""
        location = [str(part) for part in error["loc"]]
        if location[-1] == "[key]":  # a wrong key is a wrong value of the dictionary
            location = location[:-2]
        known = self._field_at(location)
        while known is None and len(location) > 1 and error["type"] != "extra_forbidden":
            known = self._field_at(location[:-1])
            if known is None or _is_union(known.annotation):
                # The last part names a member of a union, such as `int` of `int | "auto"`, or a validator.
                location = location[:-1]
        return location, known

    def _section_at(self, path: Sequence[str]) -> type[BaseModel] | None:
        """The section at a path of names, through dictionaries too (`evaluation.test.NAME`)."""
        section: Any = self._root
        for name in path:
            if isinstance(section, type) and issubclass(section, BaseModel):
                field = section.model_fields.get(name)
                section = field.annotation if field else None
            else:
                section = typing.get_args(section)[-1] if typing.get_args(section) else None
        return section if isinstance(section, type) and issubclass(section, BaseModel) else None

    def _field_at(self, path: Sequence[str]) -> Any:
        section = self._section_at(path[:-1]) if path else None
        return section.model_fields.get(path[-1]) if section is not None else None

    def _names_at(self, path: Sequence[str]) -> list[str]:
        section = self._section_at(path)
        return list(section.model_fields) if section is not None else []


Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], fields: object) -> Model:
    """An instance made of values that come from code rather than from a job's settings. Raises ConfigError."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise Explainer(kind, "").explain(error.errors(include_url=False)[0]) from error


def _takes_no_value(name: str, value: str) -> ConfigError:
    return ConfigError(name, value, "takes no value", f"write --{name} or --no-{name}")


def suggest(word: str, choices: Sequence[str]) -> str:
    """The choice that was probably meant, or all of them."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(choices)}"


def _in_other_units(error: ErrorDetails, described: str) -> str:
    """A hint for a number that is too large because it is in 8-bit levels, or in percent."""
    context = error.get("ctx", {})
    limit = context.get("le", context.get("lt"))
    try:
        value = float(error["input"])
    except (TypeError, ValueError, OverflowError):
        return ""
    if limit is not None and "pixels in [0, 1]" in described and value / 255 <= limit:
        return f"write {value:g}/255 if it is in 8-bit levels; "
    if limit is not None and "share" in described and value / 100 <= limit:
        return f"write {value / 100:g} for {value:g}%; "
    return ""


def _is_union(annotation: Any) -> bool:
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    return typing.get_origin(annotation) in (typing.Union, types.UnionType) and len(members) > 1


def _literals(annotation: Any) -> list[str]:
    members = typing.get_args(annotation)
    return [choice for one in members if typing.get_origin(one) is typing.Literal for choice in typing.get_args(one)]


def _shown(value: object) -> object:
    """The value, unless Python refuses to print it."""
    try:
        str(value)
    except (ValueError, RecursionError):
        return f"<{type(value).__name__} too large to print>"
    return value
