"""Reading a job's configuration: defaults < preset < YAML file < environment < command line."""

import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from tla_service.config import RunConfig
from tla_service.config_errors import Explainer, suggest
from tla_service.config_fields import wrong
from tla_service.config_radii import no_radius, without_lengths_of_other_norms
from tla_service.errors import ConfigError

ENV_PREFIX = "TLA_"
_FILES = ("config", "study", "preset")  # each may name the next


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    files = resources.files("tla_service") / "presets"
    return sorted(path.name.removesuffix(".yaml") for path in files.iterdir() if path.name.endswith(".yaml"))


def sweep_preset_names() -> list[str]:
    """Names that `--study` takes."""
    files = resources.files("tla_service") / "presets" / "sweeps"
    return sorted(path.name.removesuffix(".yaml") for path in files.iterdir() if path.name.endswith(".yaml"))


class JobSettings(BaseSettings):
    """What every job takes: settings from a file, the environment and the command line.

    A job's own settings are a subclass; `read_settings` reads it. A subclass with a field `preset` takes presets too.
    """

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

    config: Path | None = Field(None, description="YAML file with any of these settings")
    debug: bool = Field(False, description="show tracebacks")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line comes first by itself; then the environment, the file, the sweep's preset, the run's."""
        files = [_NamedFile(settings_cls, name) for name in _FILES if name in settings_cls.model_fields]
        return init_settings, env_settings, *files


class RunSettings(JobSettings, RunConfig):
    """A run's configuration and what the training job needs beside it."""

    model_config = JobSettings.model_config

    preset: str | None = Field(None, description="start from this preset: " + ", ".join(preset_names()))
    output: Path | None = Field(None, description="folder for results; default runs/<run name>")
    log_format: Literal["text", "json"] = Field(
        "text", description="progress and log as text, or as JSON lines with run, run id and rank"
    )
    print_config: Literal["", "yaml", "schema"] = Field(
        "", description="print the resolved configuration or its JSON schema, and stop"
    )

    @model_validator(mode="after")
    def _check_radii(self) -> Self:
        # Here, not in RunConfig: runs that were trained without this check must still load.
        for where, attack in self.evaluation.attacks.items():
            norm, epsilon, _ = attack.lengths(self.attack, self.data.name)
            if epsilon is None:
                raise wrong(f"{where}.norm", norm, *no_radius(self.data.name, norm, f"{where}.epsilon"))
        return self

    @property
    def run_config(self) -> RunConfig:
        """The run alone: what is logged, and what a worker gets."""
        return RunConfig.model_validate({name: getattr(self, name) for name in RunConfig.model_fields})

    @property
    def output_folder(self) -> Path:
        """Where results go, as an absolute path."""
        return (self.output or Path("runs") / self.run_config.run_name).expanduser().absolute()


class _NamedFile(YamlConfigSettingsSource):
    """A YAML file that another setting names."""

    def __init__(self, settings_cls: type[BaseSettings], field: str) -> None:
        super().__init__(settings_cls, yaml_file=None)
        self._field = field

    def __call__(self) -> dict[str, Any]:
        name = self.current_state.get(self._field)
        if name is None:
            return {}
        text = _READERS[self._field](name)
        try:
            values = yaml.safe_load(text) or {}
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
            # Besides its own, yaml lets through what its scalars raise: !!int x, 2020-99-99, !!bool x.
            reason = " ".join(str(error).split())
            raise ConfigError(self._field, name, f"not valid YAML ({reason})", "mend the file") from error
        if not (isinstance(values, dict) and all(isinstance(key, str) for key in values)):
            raise ConfigError(self._field, name, "holds no settings", "write them as 'section: {field: value}'")
        return without_lengths_of_other_norms(values, self.current_state)


Settings = TypeVar("Settings", bound=JobSettings)


def load_settings(arguments: Sequence[str] | None = None) -> RunSettings:
    """Read a run's configuration from all sources; see `read_settings`."""
    return read_settings(RunSettings, arguments)


def read_settings(kind: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
    """Read a job's settings from all sources.

    Environment variables of a run (``TLA_TRACKING__URI``) may be set for every job of a cluster: a job that has no such
    setting passes over them.

    Args:
        kind: The job's settings.
        arguments: Command line without the program's name; None takes `sys.argv`.

    Raises:
        ConfigError: One field is wrong.
        ExceptionGroup: Several are; a ConfigError each.
    """
    explainer = Explainer(kind, ENV_PREFIX)
    unknown = explainer.unknown_variable(RunSettings)
    if unknown is not None:
        raise unknown
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return kind(_cli_parse_args=arguments)
    except ValidationError as error:
        found = {str(mended.subject): mended for mended in map(explainer.explain, error.errors(include_url=False))}
        errors = list(found.values())
    except SettingsError as error:
        errors = [explainer.broken_variable() or explainer.explain_flag(str(error))]
    if len(errors) == 1:
        raise errors[0] from None
    raise ExceptionGroup("the configuration is wrong", errors) from None


def load_config_file(path: Path) -> RunConfig:
    """Read a resolved configuration, as written by `to_yaml`."""
    return RunConfig.model_validate(yaml.safe_load(path.read_text()))


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML; `--config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_preset(name: str) -> str:
    if name not in preset_names():
        raise ConfigError("preset", name, "no such preset", suggest(str(name), preset_names()))
    return (resources.files("tla_service") / "presets" / f"{name}.yaml").read_text()


def _read_study(name: str) -> str:
    if name not in sweep_preset_names():
        raise ConfigError("study", name, "no such study", suggest(str(name), sweep_preset_names()))
    return (resources.files("tla_service") / "presets" / "sweeps" / f"{name}.yaml").read_text()


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a text file"
        raise ConfigError(
            "config", path, f"cannot be read ({reason.lower()})", "give the path of a YAML file"
        ) from error


_READERS = {"config": _read_file, "study": _read_study, "preset": _read_preset}


def print_config(settings: RunSettings) -> str:
    """What `--print_config` asks for: the resolved configuration, or the schema that editors check files against."""
    if settings.print_config == "schema":
        return json.dumps(RunConfig.model_json_schema(), indent=2)
    return to_yaml(settings.run_config).rstrip()
