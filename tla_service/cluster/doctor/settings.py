"""Settings of the health checks, importable without torch and Ray."""

from pydantic import Field

from tla_service.config import DataConfig, ScalingConfig, TrackingConfig
from tla_service.config.loading import JobSettings


class CheckupSettings(JobSettings):
    """Settings of `jobs/doctor.py`: the sections of a run that name what to check, and the size of the checks."""

    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    data: DataConfig = DataConfig()
    workers: int | None = Field(None, ge=1, description="workers of the all-reduce; none: as for a run")
    megabytes: int = Field(64, ge=1, le=4096, description="size of what is written, read and all-reduced")
    timeout_seconds: float = Field(120, gt=0, description="timeout of a node, or of all workers together")
