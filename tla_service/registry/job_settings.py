"""Settings of the jobs on registered models, importable without torch and mlflow."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tla_service.config import DataConfig, DetectionConfig, ModelConfig, RunConfig, TrackingConfig
from tla_service.config.explain import validated
from tla_service.config.fields import ModelName, Pixels, Section, refuse, setting, wrong
from tla_service.config.loading import JobSettings
from tla_service.config.radii import Norm, documented_radius, known_shape, length_trouble, no_radius
from tla_service.errors import ConfigError
from tla_service.report.schema import ThreatModel

Format = Literal["pt2", "onnx"]
_UNIT = "pixels in [0, 1], or L2 length"


class GateRules(Section):
    """Requirements of the gate. Accuracies are fractions of the gate images."""

    norm: Norm | None = setting(
        None, "norm of the threat model to judge under; none: the one that the version was trained for"
    )
    epsilon: Pixels | None = setting(None, "radius of that threat model; required with norm", unit=_UNIT, gt=0)
    min_clean_accuracy: float = setting(0.5, "minimum accuracy on clean gate images", ge=0, le=1)
    min_autoattack_accuracy: float = setting(0.2, "minimum accuracy on gate images under AutoAttack", ge=0, le=1)
    min_images: int = setting(100, "minimum number of gate images that AutoAttack was run on", unit="images", ge=1)
    audit: bool = setting(True, "require a passed audit for gradient masking")
    min_detection_auc: float = setting(
        0.3, "minimum AUC of the detection of misclassified images under an adaptive attack; 0: none", ge=0, le=1
    )
    not_worse: bool = setting(True, "compare with the version that carries the alias, on the same images")
    significance: float = setting(
        0.05, "significance level of McNemar's paired test; a significantly worse version is refused", gt=0, lt=1
    )
    max_drop: float = setting(
        0.005, "maximum loss of accuracy compared with the current version, significant or not", ge=0, le=1
    )

    @property
    def threat_model(self) -> ThreatModel | None:
        """The threat model to judge under, if it is given."""
        return ThreatModel(norm=self.norm, epsilon=self.epsilon) if self.norm and self.epsilon else None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.norm is None and self.epsilon is not None:
            raise wrong("rules.epsilon", self.epsilon, "a radius without its norm", "give rules.norm, too")
        if self.norm is not None and self.epsilon is None:
            raise wrong("rules.norm", self.norm, "a norm without its radius", "give rules.epsilon, too")
        refuse(length_trouble("rules", self.norm, self.epsilon) if self.norm and self.epsilon else None)
        return self


class PromoteSettings(JobSettings):
    """Settings of a promotion."""

    model: str = setting("", "registered model, without a version")
    version: str = setting("", "version number to promote", pattern="^([1-9][0-9]*)?$")
    alias: str = setting("champion", "alias to give it", pattern=r"^[\w-]+$", max_length=200)
    rollback: bool = Field(False, description="give the alias back to its previous version")
    rules: GateRules = GateRules()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model:
            raise wrong("model", "", "is missing", "give --model NAME")
        if not self.version and not self.rollback:
            raise wrong("version", "", "is missing", "give --version N, or --rollback")
        if self.version and self.rollback:
            raise wrong("version", self.version, "a rollback restores the previous version", "omit it")
        if self.alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", self.alias):
            raise wrong("alias", self.alias, "MLflow reserves this alias", "choose another, such as champion")
        return self


class LeaderboardSettings(JobSettings):
    """Settings of the leaderboard."""

    models: tuple[str, ...] = setting((), "registered models to show: --models A B C; none: all")
    output: Path = Field(Path("leaderboard.html"), description="page to write")
    tracking: TrackingConfig = TrackingConfig()


class ExportSettings(JobSettings):
    """Settings of an export."""

    model: str = setting("", "model to export: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a folder")
    output: Path = Field(Path("export"), description="output folder")
    formats: tuple[Format, ...] = setting(("pt2", "onnx"), "formats to write: --formats pt2,onnx")
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model:
            raise wrong("model", "", "is missing", "give --model models:/NAME@ALIAS")
        if not self.formats:
            raise wrong("formats", "()", "is empty", "give pt2, onnx, or both")
        return self


class ImportSettings(JobSettings):
    """Settings of an import."""

    file: str = setting("", "weights: .safetensors, or .pt that torch.load reads with weights_only=True")
    name: ModelName | None = setting(None, "registered model; none: tla-<data.name>", min_length=1)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    norm: Norm = setting("linf", "norm of the threat model they were trained for")
    epsilon: Pixels | None = setting(
        None, "radius of that threat model; none: the one documented for the dataset", unit=_UNIT, gt=0
    )
    source: str = setting("", "origin of the weights for the model card: a paper, a URL", max_length=5000)
    detection: DetectionConfig = DetectionConfig()
    seed: int = setting(0, "seed of the validation split that determines the detector's threshold", ge=0, lt=2**31)
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.file:
            raise wrong("file", "", "is missing", "give --file weights.safetensors")
        if self.epsilon is None and documented_radius(self.data.name, self.norm) is None:
            raise wrong("norm", self.norm, *no_radius(self.data.name, self.norm, "--epsilon"))
        shape = known_shape(self.data.name, self.data.image_size)
        refuse(length_trouble("", self.norm, self.radius, shape=shape))
        for field, default in {"pretrained": None, "head": "keep"}.items():
            if (value := getattr(self.model, field)) != default:
                raise wrong(f"model.{field}", value, "an import takes all weights from --file", "leave it out")
        try:
            _ = self.run_config
        except ConfigError as error:
            refuse(error)
        return self

    @property
    def run_config(self) -> RunConfig:
        """The run that the version is registered as. Raises ConfigError for settings that contradict one another."""
        attack = {"norm": self.norm, "epsilon": self.radius, "step_size": self.radius / 4}
        shared = {name: getattr(self, name) for name in ("seed", "data", "model", "detection")}
        return validated(RunConfig, shared | {"attack": attack})

    @property
    def radius(self) -> float:
        """Radius of the threat model."""
        radius = self.epsilon or documented_radius(self.data.name, self.norm)
        assert radius is not None  # validated
        return radius
