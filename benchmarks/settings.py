"""Settings of the benchmark."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from tla_service.config.loading import JobSettings

CPU_STAGES = ("steps", "attacks", "switches", "parts", "mining", "scaling", "checkpoints", "startup")
GPU_STAGES = ("numerics", "steps", "fast_steps", "parts", "settings", "accuracy")


class BenchmarkSettings(JobSettings):
    """Settings of `python -m benchmarks`."""

    device: Literal["cpu", "cuda"] = Field("cpu", description="device: one CPU core (two for scaling), or one GPU")
    stages: list[str] = Field(
        [],
        description=f"stages to run; default: all of {', '.join(CPU_STAGES)}, or with cuda {', '.join(GPU_STAGES)}; "
        "compile and evaluation (minutes) run only if listed. Results of other stages in the output file are kept",
    )
    workloads: list[str] = Field([], description="networks of the suite; default: all")
    rounds: int = Field(3, description="minimum number of timed rounds, each of which runs every candidate once", ge=2)
    clock: Literal["wall", "cpu"] = Field(
        "wall", description="clock for ratios of single-process stages; cpu is not affected by other processes"
    )
    output: Path = Field(Path("runs/benchmark.json"), description="JSON file to write")
    ratios: Path = Field(Path("benchmarks/ratios.json"), description="ratios to compare with")
    keep_ratios: bool = Field(False, description="update the ratios instead of comparing")
    data_root: Path | None = Field(
        None, description="folder with CIFAR-10 for the stage accuracy (GPU), with MNIST for the stage evaluation"
    )
    accuracy_epochs: int = Field(8, description="epochs of each training of the stage accuracy", ge=1)
    variants: list[str] = Field([], description="settings measured by the stage settings (GPU); default: all")
    accuracy_seed: int = Field(0, description="seed of both trainings of the stage accuracy; rows of others are kept")
    accuracy_images: int = Field(512, description="test images for AutoAttack in accuracy and evaluation", ge=8)
    seconds: float = Field(500, description="on a GPU, stop after this long; finished stages are kept", gt=0)
