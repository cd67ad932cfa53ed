"""Reading a run's configuration: defaults < preset < YAML file < environment < command line."""

import difflib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from tla_service.config import RunConfig
from tla_service.errors import ConfigError

ENV_PREFIX = "TLA_"


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    files = resources.files("tla_service") / "presets"
    return sorted(path.name.removesuffix(".yaml") for path in files.iterdir() if path.name.endswith(".yaml"))


class RunSettings(BaseSettings, RunConfig):
    """A run's configuration and what a job needs beside it."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        cli_exit_on_error=False,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        frozen=True,
        extra="forbid",
    )

    preset: str | None = Field(None, description="start from this preset: " + ", ".join(preset_names()))
    config: Path | None = Field(None, description="YAML file with any of these settings")
    output: Path | None = Field(None, description="folder for results; default runs/<run name>")
    debug: bool = Field(False, description="show tracebacks")
    print_config: Literal["", "yaml", "schema"] = Field(
        "", description="print the resolved configuration or its JSON schema, and stop"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line comes first by itself; then the environment, the file, the preset."""
        return init_settings, env_settings, _NamedFile(settings_cls, "config"), _NamedFile(settings_cls, "preset")

    @property
    def run_config(self) -> RunConfig:
        """The run alone: what is logged, and what a worker gets."""
        return RunConfig.model_validate({name: getattr(self, name) for name in RunConfig.model_fields})

    @property
    def output_folder(self) -> Path:
        """Where results go, as an absolute path."""
        return (self.output or Path("runs") / self.run_config.run_name).expanduser().absolute()


class _NamedFile(YamlConfigSettingsSource):
    """A YAML file that another setting names: `preset` or `config`."""

    def __init__(self, settings_cls: type[BaseSettings], field: str) -> None:
        super().__init__(settings_cls, yaml_file=None)
        self._field = field

    def __call__(self) -> dict[str, Any]:
        name = self.current_state.get(self._field)
        if name is None:
            return {}
        text = _read_preset(name) if self._field == "preset" else _read_file(name)
        try:
            values = yaml.safe_load(text) or {}
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
            # Besides its own, yaml lets through what its scalars raise: !!int x, 2020-99-99, !!bool x.
            reason = " ".join(str(error).split())
            raise ConfigError(self._field, name, f"not valid YAML ({reason})", "mend the file") from error
        if not (isinstance(values, dict) and all(isinstance(key, str) for key in values)):
            raise ConfigError(self._field, name, "holds no settings", "write them as 'section: {field: value}'")
        return values


def load_settings(arguments: Sequence[str] | None = None) -> RunSettings:
    """Read the configuration from all sources.

    Args:
        arguments: Command line without the program's name; None takes `sys.argv`.

    Raises:
        ConfigError: One field is wrong.
        ExceptionGroup: Several are; a ConfigError each.
    """
    _refuse_unknown_variables()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return RunSettings(_cli_parse_args=arguments)
    except ValidationError as error:
        found = {str(mended.subject): mended for mended in map(explain, error.errors(include_url=False))}
        errors = list(found.values())
    except SettingsError as error:
        errors = [_explain_variable() or _explain_flag(str(error))]
    if len(errors) == 1:
        raise errors[0] from None
    raise ExceptionGroup("the configuration is wrong", errors) from None


def load_config_file(path: Path) -> RunConfig:
    """Read a resolved configuration, as written by `to_yaml`."""
    return RunConfig.model_validate(yaml.safe_load(path.read_text()))


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML; `--config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def explain(error: ErrorDetails) -> ConfigError:
    """Say what pydantic found in one line: field, value, reason, remedy."""
    context = error.get("ctx", {})
    if error["type"] == "cross_field":
        return ConfigError(context["field"], context["value"], context["reason"], context["remedy"])
    location = [str(part) for part in error["loc"] if part != "[key]"]
    known = _field_at(location)
    inner = error["type"] != "extra_forbidden" and len(location) > 1 and known is None
    while inner and known is None and len(location) > 1:
        above = _field_at(location[:-1])
        if above is None or _is_union(above.annotation):
            # The last part names a member of a union, such as `int` of `int | "auto"`, or a validator.
            location = location[:-1]
        known = above
    name = ".".join(location)
    value = _shown(error["input"])
    if error["type"] == "extra_forbidden":
        return ConfigError(name, value, "no such setting", _suggest(location[-1], _names_at(location[:-1])))
    reason = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "literal_error" and not (known is not None and _is_union(known.annotation)):
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return ConfigError(name, value, f"not one of {', '.join(choices)}", _suggest(str(value), choices))
    section = _section_at(location)
    if section is not None:
        return ConfigError(name, value, reason, f"write settings under it: {', '.join(section.model_fields)}")
    described = known.description if known is not None and known.description else "see --help"
    return ConfigError(name, value, reason, f"it is: {described}")


def _is_union(annotation: Any) -> bool:
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    return typing.get_origin(annotation) in (typing.Union, types.UnionType) and len(members) > 1


def _shown(value: object) -> object:
    """The value, unless Python refuses to print it."""
    try:
        str(value)
    except (ValueError, RecursionError):
        return f"<{type(value).__name__} too large to print>"
    return value


def _explain_variable() -> ConfigError | None:
    """A variable of a section or a list that is no JSON; pydantic-settings does not say which."""
    for variable, text in os.environ.items():
        if variable.upper().startswith(ENV_PREFIX):
            location = variable.upper().removeprefix(ENV_PREFIX).lower().split("__")
            field = _field_at(location)
            composite = field is not None and (
                _section_at(location) is not None or typing.get_origin(field.annotation) in (dict, tuple)
            )
            if composite:
                try:
                    json.loads(text)
                except ValueError:
                    return ConfigError(
                        variable, text, "not valid JSON", "write it as JSON, or set its fields one by one"
                    )
    return None


def _suggest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(choices)}"


def _section_at(location: Sequence[str]) -> type[BaseModel] | None:
    """The section that a path of names leads to, through dictionaries too."""
    section: Any = RunSettings
    for name in location:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            # A dictionary's values: evaluation.test.NAME
            section = typing.get_args(section)[-1] if typing.get_args(section) else None
            continue
        field = section.model_fields.get(name)
        section = field.annotation if field else None
    return section if isinstance(section, type) and issubclass(section, BaseModel) else None


def _field_at(location: Sequence[str]) -> Any:
    section = _section_at(location[:-1]) if location else None
    return section.model_fields.get(location[-1]) if section is not None else None


def _names_at(location: Sequence[str]) -> list[str]:
    section = _section_at(location)
    return list(section.model_fields) if section is not None else []


def _all_flags() -> list[str]:
    sections = {name: _section_at([name]) for name in RunSettings.model_fields}
    inner = [f"{name}.{field}" for name, section in sections.items() if section for field in section.model_fields]
    return [*RunSettings.model_fields, *inner]


def _explain_flag(message: str) -> ConfigError:
    """Turn the argument parser's complaint into ours."""
    unknown = re.search(r"unrecognized arguments: (--)?(\S+)", message)
    if unknown:
        flag = unknown[2].split("=")[0]
        close = difflib.get_close_matches(flag, _all_flags(), n=1, cutoff=0.5)
        remedy = f"did you mean --{close[0]}?" if close else "see --help"
        return ConfigError(f"{unknown[1] or ''}{flag}", None, "no such flag", remedy)
    reason = message.removeprefix("error parsing CLI: ")
    return ConfigError("command line", None, reason, "see --help")


def _refuse_unknown_variables() -> None:
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX):
            top = variable.removeprefix(ENV_PREFIX).lower().split("__")[0]
            path = variable.removeprefix(ENV_PREFIX).lower().split("__")
            plain = len(path) > 1 and top in RunSettings.model_fields and _section_at(path[:1]) is None
            if plain or (top not in RunSettings.model_fields and not top.startswith("test_")):
                remedy = "sections and fields are joined by two underscores, as in TLA_LOSS__MARGIN"
                raise ConfigError(variable, os.environ[variable], "no such setting", remedy)


def _read_preset(name: str) -> str:
    if name not in preset_names():
        raise ConfigError("preset", name, "no such preset", _suggest(str(name), preset_names()))
    return (resources.files("tla_service") / "presets" / f"{name}.yaml").read_text()


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a text file"
        raise ConfigError(
            "config", path, f"cannot be read ({reason.lower()})", "give the path of a YAML file"
        ) from error


def print_config(settings: RunSettings) -> str:
    """What `--print_config` asks for: the resolved configuration, or the schema that editors check files against."""
    if settings.print_config == "schema":
        return json.dumps(RunConfig.model_json_schema(), indent=2)
    return to_yaml(settings.run_config).rstrip()
