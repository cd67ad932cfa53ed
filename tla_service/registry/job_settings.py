"""Settings of the jobs on registered models, importable without torch and mlflow."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tla_service.config import DataConfig, DetectionConfig, ModelConfig, TrackingConfig
from tla_service.config.bounds import Norm, known_shape, length_trouble
from tla_service.config.fields import Pixels, Section, setting, wrong
from tla_service.config.loading import JobSettings
from tla_service.config.names import model_trouble
from tla_service.config.radii import documented_radius, no_radius
from tla_service.report.schema import ThreatModel

Format = Literal["pt2", "onnx"]


class GateRules(Section):
    """Requirements of the gate. Accuracies are fractions of the gate images."""

    norm: Norm | None = setting(
        None, "norm of the threat model it is judged under; none: the one that the version was trained for"
    )
    epsilon: Pixels | None = setting(
        None, "radius of that threat model; none: as for the norm", unit="pixels in [0, 1], or L2 length", gt=0
    )
    min_clean_accuracy: float = setting(0.5, "least accuracy on clean images", ge=0, le=1)
    min_autoattack_accuracy: float = setting(0.2, "least accuracy under AutoAttack", ge=0, le=1)
    min_images: int = setting(100, "fewest of these images that AutoAttack was run on", unit="images", ge=1)
    audit: bool = setting(True, "the audit for gradient masking must have passed")
    min_detection_auc: float = setting(0.6, "least area under the ROC curve of the detection of errors", ge=0, le=1)
    not_worse: bool = setting(True, "compare with the version that holds the alias, on the same images")
    significance: float = setting(
        0.05, "worse by McNemar's paired test at this level is refused, however small the difference", gt=0, lt=1
    )
    max_drop: float = setting(
        0.005, "accuracy that may be lost to the holder of the alias, significant or not", ge=0, le=1
    )

    @property
    def threat_model(self) -> ThreatModel | None:
        """The threat model to judge under; None: the one that the version was trained for."""
        if self.norm is None or self.epsilon is None:
            return None
        return ThreatModel(norm=self.norm, epsilon=self.epsilon)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.norm is None and self.epsilon is not None:
            raise wrong("rules.epsilon", self.epsilon, "a radius without its norm", "give rules.norm, too")
        if self.norm is not None and self.epsilon is None:
            raise wrong("rules.norm", self.norm, "a norm without its radius", "give rules.epsilon, too")
        threat = self.threat_model
        trouble = None if threat is None else length_trouble("rules", threat.norm, threat.epsilon)
        if trouble is not None:
            raise wrong(*trouble)
        return self


class PromoteSettings(JobSettings):
    """Settings of a promotion."""

    model: str = setting("", "registered model, without a version")
    version: str = setting("", "number of the version to promote", pattern=r"^\d*$")
    alias: str = setting("champion", "alias to give it", pattern=r"^[\w-]+$", max_length=200)
    rollback: bool = Field(False, description="give the alias back to the version that carried it before")
    rules: GateRules = GateRules()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model:
            raise wrong("model", "", "no model is named", "give --model NAME")
        if not self.version and not self.rollback:
            raise wrong("version", "", "no version is named", "give --version N, or --rollback")
        if self.version and self.rollback:
            raise wrong("version", self.version, "a rollback goes to the version before", "leave it out")
        if self.alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", self.alias):
            raise wrong("alias", self.alias, "MLflow reserves this alias", "choose another, such as champion")
        return self


class ExportSettings(JobSettings):
    """Settings of an export."""

    model: str = setting("", "model to export: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a folder")
    output: Path = Field(Path("export"), description="folder of the files")
    formats: tuple[Format, ...] = setting(("pt2", "onnx"), "formats to write: --formats pt2,onnx")
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model:
            raise wrong("model", "", "no model is named", "give --model models:/NAME@ALIAS")
        if not self.formats:
            raise wrong("formats", "()", "nothing to write", "give pt2, onnx, or both")
        return self


class ImportSettings(JobSettings):
    """Settings of an import."""

    file: str = setting("", "weights: a .safetensors file, or a .pt file that torch.load reads with weights_only=True")
    name: str | None = setting(None, "name to register them under; none: tla-<data.name>", min_length=1)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    norm: Norm = setting("linf", "norm of the perturbations they were trained against")
    epsilon: Pixels | None = setting(
        None, "radius of these; none: the one documented for the data set", unit="pixels in [0, 1], or L2 length", gt=0
    )
    source: str = setting("", "where they come from: a paper, an address; goes to the model card", max_length=5000)
    detection: DetectionConfig = DetectionConfig()
    seed: int = setting(0, "seed of the validation split that the detector's threshold is fixed on", ge=0, lt=2**31)
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.file:
            raise wrong("file", "", "no weights are named", "give --file weights.safetensors")
        if self.epsilon is None and documented_radius(self.data.name, self.norm) is None:
            raise wrong("norm", self.norm, *no_radius(self.data.name, self.norm, "--epsilon"))
        shape = known_shape(self.data.name, self.data.image_size)
        trouble = model_trouble("name", self.name) if self.name else None
        trouble = trouble or length_trouble("", self.norm, self.radius, shape=shape)
        if trouble is not None:
            raise wrong(*trouble)
        return self

    @property
    def radius(self) -> float:
        """Radius of the threat model."""
        radius = self.epsilon or documented_radius(self.data.name, self.norm)
        assert radius is not None  # validated
        return radius
