"""Reading a job's configuration: defaults < preset < YAML file < environment < command line."""

import contextlib
import copy
import functools
import json
import logging
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from tla_service.config import RunConfig
from tla_service.config.explain import Explainer, suggest, validated
from tla_service.config.fields import refuse
from tla_service.config.radii import known_shape, without_lengths_of_other_norms
from tla_service.config.yaml_files import check_json, dump_yaml, parse_yaml, read_yaml
from tla_service.errors import ConfigError
from tla_service.files import expanded

_log = logging.getLogger(__name__)
CONFIG = "config.yaml"  # in a run's output folder
_PRESETS = Path(__file__).parent / "presets"
_FOLDERS = {"study": _PRESETS / "sweeps", "preset": _PRESETS}
_FILES = ("config", *_FOLDERS)  # each may name the next


def preset_names(field: str = "preset") -> list[str]:
    """Names that `--preset` or `--study` takes."""
    return sorted(file.stem for file in _FOLDERS[field].glob("*.yaml"))


class JobSettings(BaseSettings):
    """Base of every job's settings: read from a file, the environment and the command line by `read_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="TLA_",
        env_nested_delimiter="__",
        cli_exit_on_error=False,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )

    config: Path | None = Field(None, description="YAML file with any of these settings")
    debug: bool = Field(False, description="show tracebacks")

    @field_validator("*", mode="before")
    @classmethod
    def _path_is_not_empty(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what a shell makes of a variable that is not set: the working folder, to pathlib."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value == "" and Path in (annotation, *typing.get_args(annotation)):
            raise PydanticCustomError("path", "an empty path")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """After the command line, which comes first by itself: the environment, then the files."""
        files = [_NamedFile(settings_cls, name) for name in _FILES if name in settings_cls.model_fields]
        return init_settings, env_settings, *files


class RunSettings(JobSettings, RunConfig):
    """A run's configuration, and options of the training job that are not part of it."""

    model_config = JobSettings.model_config

    preset: str | None = Field(None, description="start from this preset: " + ", ".join(preset_names()))
    output: Path | None = Field(None, description="output folder; default: runs/<run name>")
    log_format: Literal["text", "json"] = Field(
        "text", description="print progress and logs as text, or as JSON lines with run, run id and rank"
    )
    print_config: Literal["", "yaml", "schema"] = Field(
        "", description="print the resolved configuration or its JSON schema, and exit"
    )

    @model_validator(mode="before")
    @classmethod
    def _hint_old_name(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        if isinstance(model, dict) and model.get("weights") is not None:
            _hint_renamed()
        return values

    @model_validator(mode="after")
    def _check_attacks(self) -> Self:
        shape = known_shape(self.data.name, self.data.image_size)
        refuse(self.attack_trouble(shape))
        return self

    @property
    def run_config(self) -> RunConfig:
        """The run alone: what is logged, and what a worker gets."""
        return RunConfig.model_validate({name: getattr(self, name) for name in RunConfig.model_fields})


class _NamedFile(YamlConfigSettingsSource):
    """A YAML file that the setting `field` names: a path, a preset or a study."""

    def __init__(self, settings_cls: type[BaseSettings], field: str) -> None:
        super().__init__(settings_cls, yaml_file=None)
        self._field = field

    def __call__(self) -> dict[str, Any]:
        field, name = self._field, self.current_state.get(self._field)
        if name is None:
            return {}
        if field == "config":
            values = read_yaml(Path(name), field) or {}
        elif name in preset_names(field):
            values = parse_yaml((_FOLDERS[field] / f"{name}.yaml").read_text("utf-8"), field, name)
        else:
            raise ConfigError(field, name, f"no such {field}", suggest(str(name), preset_names(field)))
        if not (isinstance(values, dict) and all(isinstance(key, str) for key in values)):
            raise ConfigError(field, name, "contains no settings", "write them as 'section: {field: value}'")
        if "config" in values:
            remedy = "copy its settings here; a preset may be named by preset"
            raise ConfigError("config", name, f"names another file ({values['config']}), which is not read", remedy)
        return without_lengths_of_other_norms(values, self.current_state)


Settings = TypeVar("Settings", bound=JobSettings)


def load_config(preset: str | None = None, config: str | Path | None = None, **settings: Any) -> RunConfig:
    """Make a run's configuration in Python: defaults < preset < YAML file < environment < arguments.

    For example, ``load_config("digits", seed=1, training={"epochs": 5}, attack={"epsilon": "8/255"})``.

    Args:
        preset: Preset to start from; see docs/configuration.md.
        config: YAML file with any of the settings.
        settings: Settings of the run. A section is a dictionary or one of the classes, such as `LossConfig`; fields
            that are not given keep their values.

    Raises:
        ConfigError: A setting is wrong.
        ExceptionGroup: Several are; one ConfigError each.
    """
    for name, value in settings.items():
        if name not in RunConfig.model_fields:
            raise ConfigError(name, value, "no such setting", suggest(name, list(RunConfig.model_fields)))
    files = {name: value for name, value in (("preset", preset), ("config", config)) if value is not None}
    given = TypeAdapter(Any).dump_python(settings, exclude_unset=True)  # sections that are objects, too
    return read_settings(RunSettings, [], **files, **given).run_config


def load_settings(arguments: Sequence[str] | None = None) -> RunSettings:
    """Read the settings of a training job from all sources."""
    return read_settings(RunSettings, arguments)


def read_settings(kind: type[Settings], arguments: Sequence[str] | None = None, **values: Any) -> Settings:
    """Read a job's settings from all sources; `values` override every other source but the command line.

    Environment variables of a run (`TLA_TRACKING__URI`) may be set for all jobs of a cluster: a job without such a
    setting ignores them. Raises a ConfigError for a wrong setting, and an ExceptionGroup of them for several.
    """
    explainer = Explainer(kind, "TLA_")
    explainer.check_variables(RunSettings)
    arguments = [*_checked(sys.argv[1:] if arguments is None else arguments)]
    try:
        command_line = copy.copy(_command_line(kind))(args=arguments)  # a copy: it keeps what it has parsed
        return kind(_cli_settings_source=command_line, **values)
    except ValidationError as error:
        found = map(explainer.explain, error.errors(include_url=False))
        errors = list({str(one.subject): one for one in found}.values())
    except SettingsError as error:
        errors = [explainer.explain_source(str(error), arguments)]
    if len(errors) == 1:
        raise errors[0] from None
    raise ExceptionGroup("the configuration is wrong", errors) from None


@functools.cache
def _command_line(kind: type[JobSettings]) -> CliSettingsSource[Any]:
    """The parser of a job's flags: making it takes longer than all else that reading settings does."""
    return CliSettingsSource(kind)


def load_config_file(path: Path) -> RunConfig:
    """Read a resolved configuration, as written by `to_yaml`; ConfigError if that is not possible."""
    values = read_yaml(path, "config")
    try:
        return validated(RunConfig, values)
    except ConfigError as found:
        remedy = "correct the file, or read it with the version of tla-service that wrote it"
        raise ConfigError("config", path, f"holds a wrong setting ({found.subject}: {found.reason})", remedy) from found


def same_run(text: str, config: RunConfig) -> bool:
    """Whether a `config.yaml` equals this run's in everything that shapes the weights, by this version's rules."""
    try:
        return RunConfig.model_validate(parse_yaml(text, "config", "config.yaml")).digest == config.digest
    except (ValidationError, ConfigError):
        return False


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML, without credentials in URLs; `--config` reads it back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def print_config(settings: RunSettings) -> str:
    """What `--print_config` prints: the resolved configuration, or the schema that editors check files against."""
    if settings.print_config == "schema":
        return json.dumps(RunConfig.model_json_schema(), indent=2)
    return to_yaml(settings.run_config).rstrip()


def find_output(settings: RunSettings) -> tuple[RunConfig, Path]:
    """The run and its output folder, absolute; one that an earlier version named by another default keeps its own."""
    config = settings.run_config
    output = expanded("output", settings.output or Path("runs") / config.run_name).absolute()
    if config.name or settings.output is not None or output.exists():
        return config, output
    for path in sorted(output.parent.glob(f"{config.name_stem}-{'[0-9a-f]' * 8}/{CONFIG}")):
        with contextlib.suppress(OSError):  # of others, maybe
            if same_run(path.read_text(errors="replace"), config):
                return config.model_copy(update={"name": path.parent.name}), path.parent
    return config, output


@functools.cache
def _hint_renamed() -> None:
    _log.warning("model.weights is now called model.pretrained; the next release will not accept the old name")


def _checked(arguments: Sequence[str]) -> Iterator[str]:
    """A command line with flags under their present names; ConfigError for a JSON object with a duplicate key."""
    flag = ""
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        if name == "--model.weights":
            _hint_renamed()
            name = "--model.pretrained"
        flag = name or flag
        check_json(flag, value)
        if name.startswith("--") and "\n" in value:
            yield from (name, value)  # pydantic-settings would drop what follows the first line
        else:
            yield f"{name}{equals}{value}"
