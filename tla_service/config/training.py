"""Optimizer, schedule, training length and precision, and speed settings."""

from typing import Literal, Self

from pydantic import model_validator

from tla_service.config.fields import Section, setting, wrong


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw"] = setting("sgd", "optimizer")
    learning_rate: float = setting(0.1, "initial learning rate", gt=0)
    momentum: float = setting(0.9, "momentum of sgd, first beta of adam", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov momentum")
    weight_decay: float = setting(0.0, "L2 weight decay", ge=0)
    decay: Literal["kernels", "all"] = setting(
        "kernels", "apply weight decay to convolution and linear kernels only (code), or to all parameters"
    )
    grad_clip: float | None = setting(None, "clip the global L2 norm of the gradient; none: off", gt=0)


class ScheduleConfig(Section):
    """The learning rate schedule."""

    name: Literal["constant", "piecewise", "cosine", "cyclic"] = setting("constant", "shape of the schedule")
    milestones: tuple[int, ...] = setting((), "piecewise: multiply by factor at each of these")
    unit: Literal["epoch", "step"] = setting("epoch", "unit of milestones and warmup")
    factor: float = setting(0.1, "piecewise: factor at each milestone", gt=0, lt=1)
    warmup: float = setting(0.0, "length of the linear warm-up", unit="schedule.unit", ge=0)
    peak: float = setting(0.4, "cyclic: share of the run after which the rate peaks", gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise wrong("schedule.milestones", self.milestones, "not in ascending order", "sort them, without repeats")
        if self.name == "piecewise" and not self.milestones:
            raise wrong("schedule.milestones", "()", "a piecewise schedule needs milestones", "give some, or constant")
        return self


class TrainingConfig(Section):
    """Length, batch size, precision and weight averaging."""

    epochs: int = setting(10, "passes over the training set", unit="epochs", ge=1)
    max_steps: int | None = setting(None, "stop after this many optimizer steps", unit="steps", ge=1)
    global_batch_size: int = setting(128, "images per optimizer step, over all workers", unit="images", ge=2)
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "bfloat16 runs the network under autocast; losses, signs and projections stay float32"
    )
    channels_last: bool = setting(False, "channels-last memory format; faster convolutions on GPUs")
    ema_decay: float | None = setting(
        None, "keep an exponential moving average of the weights with this decay per step, and evaluate it", gt=0, lt=1
    )
    batchnorm_roles: Literal["together", "apart"] = setting(
        "together", "BatchNorm statistics over adversarial and clean images together, or per role (authors' code)"
    )
    log_every_steps: int = setting(50, "log progress every this many steps", unit="steps", ge=1)


class SpeedConfig(Section):
    """Faster execution of the same step: results change by rounding only. More such settings are in other sections."""

    fold_batchnorm: bool = setting(
        True, "attack a copy of the network with BatchNorm folded into the preceding convolutions"
    )
    compile: Literal["none", "attack", "all"] = setting(
        "none", "torch.compile the attacked network, or the update too; pays off on GPUs, slower on CPUs"
    )
    cuda_graphs: bool = setting(False, "capture all steps of the attack in one CUDA graph; GPUs only")
    keep_freed_memory: bool = setting(True, "on a CPU, reuse freed memory between steps instead of returning it")
    fused_optimizer: bool = setting(True, "update all parameters in one kernel")
    overlap_reduction: bool = setting(True, "reduce gradients across workers during the backward pass")
    tune_kernels: bool = setting(False, "cuDNN benchmark mode: picks the fastest kernels; runs then differ in rounding")
