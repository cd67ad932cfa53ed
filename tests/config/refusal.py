"""What wrong configurations are refused with."""

import re
from pathlib import Path

from tla_service.config.loading import load_settings
from tla_service.errors import ConfigError


def refusals(arguments: list[str]) -> list[ConfigError]:
    """What a wrong configuration is refused with, each message being readable."""
    found: list[ConfigError] = []
    several = False
    try:
        load_settings(arguments)
    except ConfigError as error:
        found = [error]
    except ExceptionGroup as group:
        several = True
        found = list(group.exceptions)  # type: ignore[arg-type]
    assert several == (len(found) > 1)
    for error in found:
        assert type(error) is ConfigError
        assert re.fullmatch(r".*: .+; .+", str(error), flags=re.DOTALL)
    return found


def refusal(arguments: list[str]) -> ConfigError:
    found = refusals(arguments)
    assert len(found) == 1
    return found[0]


def file_of(folder: Path, text: str) -> list[str]:
    (folder / "run.yaml").write_text(text)
    return ["--config", str(folder / "run.yaml")]
