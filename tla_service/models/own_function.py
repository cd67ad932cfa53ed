"""Functions from outside the package, by import path."""

import importlib
from collections.abc import Callable
from typing import Any

from tla_service.errors import ConfigError, UnavailableError


def load_function(field: str, path: str, code: bytes | None = None) -> Callable[..., Any]:
    """The function `module:function` that a setting names; UserError, naming `field`, if it does not import."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UnavailableError(
            field, path, f"there is no module {error.name}", "put its folder on the PYTHONPATH"
        ) from error
    except Exception as error:
        raise ConfigError(field, path, f"does not import: {error}", "correct it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(field, path, f"{module_name} has no function {name}", "correct the name")
    return function
