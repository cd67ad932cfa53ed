"""MLflow: tracks runs, packages networks as model versions and loads them again. The only room that imports mlflow.

Importing this package is cheap: each name is fetched from its module at first use, because mlflow takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tla_service.registry.connection import check_tracking, sqlite_path, tracking_uri
    from tla_service.registry.environment import code_facts
    from tla_service.registry.evaluation_log import log_evaluation
    from tla_service.registry.integrity import find_pickles
    from tla_service.registry.loading import load_model, open_package, pin_version, resolve_weights
    from tla_service.registry.packaging import PackagedModel, check_packaging, log_model
    from tla_service.registry.probe import probe_tracking
    from tla_service.registry.run_log import RunLog
    from tla_service.registry.tracking import (
        fetch_files,
        find_finished,
        finish_run,
        log_files,
        open_run,
        run_page,
        start_system_metrics,
        tag_run,
    )

__all__ = [
    "PackagedModel",
    "RunLog",
    "check_packaging",
    "check_tracking",
    "code_facts",
    "fetch_files",
    "find_finished",
    "find_pickles",
    "finish_run",
    "load_model",
    "log_evaluation",
    "log_files",
    "log_model",
    "open_package",
    "open_run",
    "pin_version",
    "probe_tracking",
    "resolve_weights",
    "run_page",
    "sqlite_path",
    "start_system_metrics",
    "tag_run",
    "tracking_uri",
]

_MODULES = {
    "connection": ("check_tracking", "sqlite_path", "tracking_uri"),
    "integrity": ("find_pickles",),
    "loading": ("load_model", "open_package", "pin_version", "resolve_weights"),
    "environment": ("code_facts",),
    "evaluation_log": ("log_evaluation",),
    "packaging": ("PackagedModel", "check_packaging", "log_model"),
    "probe": ("probe_tracking",),
    "run_log": ("RunLog",),
    "tracking": (
        "fetch_files",
        "find_finished",
        "finish_run",
        "log_files",
        "open_run",
        "run_page",
        "start_system_metrics",
        "tag_run",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
