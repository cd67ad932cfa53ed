"""A run's configuration: frozen, validated sections. Importing it needs no torch."""

from tla_service.config.adversary import AttackConfig, EvaluationAttack
from tla_service.config.run import Method, RunConfig
from tla_service.config.sections import (
    DataConfig,
    DatasetName,
    DetectionConfig,
    EvaluationConfig,
    LossConfig,
    MiningConfig,
    ModelConfig,
    OptimizerConfig,
    ScalingConfig,
    ScheduleConfig,
    SpeedConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AttackConfig",
    "DataConfig",
    "DatasetName",
    "DetectionConfig",
    "EvaluationAttack",
    "EvaluationConfig",
    "LossConfig",
    "Method",
    "MiningConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScalingConfig",
    "ScheduleConfig",
    "SpeedConfig",
    "TrackingConfig",
    "TrainingConfig",
]
