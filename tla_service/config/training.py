"""Sections of a run on optimisation: optimiser, schedule, length and precision, and what makes it fast."""

from typing import Literal, Self

from pydantic import model_validator

from tla_service.config.fields import Section, setting, wrong


class OptimizerConfig(Section):
    """The optimiser."""

    name: Literal["sgd", "adam", "adamw"] = setting("sgd", "optimiser")
    learning_rate: float = setting(0.1, "learning rate at the start", gt=0)
    momentum: float = setting(0.9, "momentum of sgd, first beta of adam", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov momentum")
    weight_decay: float = setting(0.0, "L2 weight decay", ge=0)
    decay: Literal["kernels", "all"] = setting(
        "kernels", "decay convolution and linear kernels only (code), or everything"
    )
    grad_clip: float | None = setting(None, "clip the gradient's global L2 norm; none is off", gt=0)


class ScheduleConfig(Section):
    """The learning rate over time."""

    name: Literal["constant", "piecewise", "cosine", "cyclic"] = setting("constant", "shape of the schedule")
    milestones: tuple[int, ...] = setting((), "piecewise: multiply by factor at each of these")
    unit: Literal["epoch", "step"] = setting("epoch", "unit of milestones and warmup")
    factor: float = setting(0.1, "piecewise: factor at each milestone", gt=0, lt=1)
    warmup: float = setting(0.0, "linear warm-up over this long", unit="schedule.unit", ge=0)
    peak: float = setting(0.4, "cyclic: rise to the full rate at this share of the run", gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise wrong("schedule.milestones", self.milestones, "not in rising order", "sort them, each once")
        if self.name == "piecewise" and not self.milestones:
            raise wrong("schedule.milestones", "()", "a piecewise schedule needs milestones", "give some, or constant")
        return self


class TrainingConfig(Section):
    """Length, batch, precision and weight averaging."""

    epochs: int = setting(10, "passes over the training set", unit="epochs", ge=1)
    max_steps: int | None = setting(None, "stop after this many optimiser steps", unit="steps", ge=1)
    global_batch_size: int = setting(128, "images an optimiser step, over all workers", unit="images", ge=2)
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "bfloat16 runs the network under autocast; losses, signs and projections stay float32"
    )
    channels_last: bool = setting(False, "memory layout of images and kernels; faster for convolutions on GPUs")
    ema_decay: float | None = setting(
        None, "average the weights with this decay a step and evaluate the average", gt=0, lt=1
    )
    batchnorm_roles: Literal["together", "apart"] = setting(
        "together", "BatchNorm statistics over adversarial and clean images together, or per role (the authors' code)"
    )
    log_every_steps: int = setting(50, "progress record every this many steps", unit="steps", ge=1)


class SpeedConfig(Section):
    """How the same step is computed faster: results change by rounding only. More switches are in other sections."""

    fold_batchnorm: bool = setting(
        True, "attack a twin of the network whose BatchNorms are multiplied into the convolutions before them"
    )
    compile: Literal["none", "attack", "all"] = setting(
        "none", "torch.compile the attacked network, or the update's as well; pays on GPUs, slower on CPUs"
    )
    cuda_graphs: bool = setting(False, "capture the attack's steps as one CUDA graph; GPUs only")
    keep_freed_memory: bool = setting(
        True, "on a CPU, keep freed memory for the next step instead of handing it back to the system in between"
    )
    fused_optimizer: bool = setting(True, "update all parameters in one kernel")
    overlap_reduction: bool = setting(True, "send gradients to other workers while the backward pass goes on")
    tune_kernels: bool = setting(False, "let cuDNN time its kernels and take the fastest; runs then differ in rounding")
