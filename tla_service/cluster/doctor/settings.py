"""What the check-up looks at. Read without torch and Ray."""

from pydantic import Field

from tla_service.config import DataConfig, ScalingConfig, TrackingConfig
from tla_service.config.loading import JobSettings


class CheckupSettings(JobSettings):
    """Settings of `jobs/doctor.py`: those of a run that say where things are, and how hard to try them."""

    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    data: DataConfig = DataConfig()
    workers: int | None = Field(None, ge=1, description="workers of the all-reduce; none: a run's own number")
    megabytes: int = Field(64, ge=1, le=4096, description="size of what is written, read and summed over workers")
    timeout_seconds: float = Field(120, gt=0, description="how long a node, or the workers together, may take")
