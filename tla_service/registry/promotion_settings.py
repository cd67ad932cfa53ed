"""What the promotion job can be told."""

from typing import Self

from pydantic import Field, model_validator

from tla_service.config import TrackingConfig
from tla_service.config_fields import setting, wrong
from tla_service.config_loading import JobSettings
from tla_service.registry.gate_rules import GateRules


class PromoteSettings(JobSettings):
    """A promotion, complete."""

    model: str = setting("", "registered model, without a version")
    version: str = setting("", "number of the version to promote", pattern=r"^\d*$")
    alias: str = setting("champion", "alias to give it", min_length=1)
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
        return self
