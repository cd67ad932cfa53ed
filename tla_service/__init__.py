"""Adversarially robust image classifiers: trained with TLA on a cluster, tracked and registered in MLflow.

The names below are the public Python API (docs/api.md). They are resolved on first use: importing the package imports
neither torch nor any other heavy library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tla_service.api import craft, evaluate
    from tla_service.attacks import Attack
    from tla_service.config import (
        AttackConfig,
        DataConfig,
        DetectionConfig,
        EvaluationConfig,
        LossConfig,
        MiningConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        ScalingConfig,
        ScheduleConfig,
        SpeedConfig,
        TrackingConfig,
        TrainingConfig,
    )
    from tla_service.config.adversary import EvaluationAttack
    from tla_service.config.loading import load_config
    from tla_service.errors import ConfigError, UnavailableError, UserError
    from tla_service.registry.loading import load_model
    from tla_service.training.local import train

__version__ = "0.1.0"

__all__ = [
    "Attack",
    "AttackConfig",
    "ConfigError",
    "DataConfig",
    "DetectionConfig",
    "EvaluationAttack",
    "EvaluationConfig",
    "LossConfig",
    "MiningConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScalingConfig",
    "ScheduleConfig",
    "SpeedConfig",
    "TrackingConfig",
    "TrainingConfig",
    "UnavailableError",
    "UserError",
    "craft",
    "evaluate",
    "load_config",
    "load_model",
    "train",
]

_HOMES = {
    "Attack": "attacks",
    "ConfigError": "errors",
    "EvaluationAttack": "config.adversary",
    "UnavailableError": "errors",
    "UserError": "errors",
    "craft": "api",
    "evaluate": "api",
    "load_config": "config.loading",
    "load_model": "registry.loading",
    "train": "training.local",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'config')}"), name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(f"{__name__}."):
            raise
        from tla_service.errors import UnavailableError

        reason = "this is the copy in a version that MLflow has loaded, which only predicts"
        remedy = "import tla_service before mlflow.pyfunc.load_model is called"
        raise UnavailableError(f"tla_service.{name}", None, reason, remedy) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
