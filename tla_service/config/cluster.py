"""Sections of a run: workers and tracking."""

import math
import re
from typing import Literal, Self

from pydantic import field_validator, model_validator

from tla_service.config.fields import ExperimentName, ModelName, Section, TagName, TagValue, setting, wrong


class ScalingConfig(Section):
    """Workers and their resources."""

    num_workers: int | Literal["auto"] | tuple[int, int] = setting(
        "auto",
        "DDP processes; auto: all GPUs of the cluster, or 2 on CPUs; [fewest, most]: as many as there is room for",
    )
    use_gpu: bool | Literal["auto"] = setting("auto", "train on GPUs; auto: if the cluster has any")
    cpus_per_worker: float = setting(1, "CPU cores reserved per worker", unit="cores", gt=0)
    gpus_per_worker: float = setting(1, "GPUs per worker; below 1 workers share a GPU", unit="GPUs", gt=0)
    max_failures: int = setting(3, "restarts from the last checkpoint before the run fails", ge=0)
    hang_seconds: float = setting(
        600, "restart if one worker holds up the others for so long; above their longest pause", unit="seconds", gt=0
    )
    async_validation: bool = setting(
        False, "train on while a task on resources like a worker's validates the epoch; the result is the same"
    )
    storage: str | None = setting(
        None, "storage of checkpoints: a shared folder or s3://bucket/prefix; none: the output folder", min_length=1
    )
    wait_seconds: float = setting(
        0, "wait this long for an autoscaling cluster to add nodes; 0: fail at once", unit="seconds", ge=0
    )
    address: str | None = setting(None, "Ray cluster to join; none: RAY_ADDRESS, else start a local one")

    def bounds(self, auto: int) -> tuple[int, int]:
        """The fewest and the most workers; `auto` if their number is left to the cluster."""
        if isinstance(self.num_workers, tuple):
            return self.num_workers
        return (auto, auto) if self.num_workers == "auto" else (self.num_workers, self.num_workers)

    @field_validator("storage")
    @classmethod
    def _without_slash(cls, value: str | None) -> str | None:
        """Names are joined to it, and S3 has no empty ones in between."""
        return value if value is None or value.endswith("://") else value.rstrip("/") or "/"

    @field_validator("num_workers", mode="before")
    @classmethod
    def _check_number(cls, value: object) -> object:
        """One message instead of one per member of the union."""
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # of the command line
        if isinstance(value, bool) or value == "auto":
            return value
        numbers = value if isinstance(value, list | tuple) else (value, value)
        whole = len(numbers) == 2 and all(re.fullmatch("[1-9][0-9]{0,8}", str(number)) for number in numbers)
        if whole and int(numbers[0]) <= int(numbers[1]):
            return value
        reason = "not a number of processes, nor the fewest and the most of them, from 1 up"
        raise wrong("scaling.num_workers", value, reason, "write 2, a range as [2, 8], or auto")

    @model_validator(mode="after")
    def _check(self) -> Self:
        share, elastic = self.gpus_per_worker, isinstance(self.num_workers, tuple)
        if elastic and share < 1 and not math.isclose(1 / share, round(1 / share)):
            # Ray Train divides the GPUs of a node by the share, and would wait for workers that do not fit.
            reason = "leaves a part of each GPU over, which a range of workers cannot allow for"
            raise wrong("scaling.gpus_per_worker", share, reason, "use 1, or 1 divided by a whole number")
        if elastic and self.async_validation:
            reason = "a range of workers takes all the room there is, and validation would wait for some"
            raise wrong("scaling.async_validation", "True", reason, "leave it out, or give one number of workers")
        return self


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = setting(None, "tracking server; none: MLFLOW_TRACKING_URI, else the SQLite file mlflow.db")
    experiment: ExperimentName = setting("tla", "MLflow experiment")
    registered_model: ModelName | None = setting(
        None, 'name to register the best weights under; none: tla-<data.name>; "": do not register'
    )
    tags: dict[TagName, TagValue] = setting({}, "additional tags of the run")
