"""Sections of a run: loss, mining, optimizer, schedule, training and speed."""

from typing import Literal, Self

from pydantic import model_validator

from tla_service.config.fields import Function, Pixels, Section, setting, wrong


class LossConfig(Section):
    """Adversarial cross-entropy, the triplet term, the norm penalty, and the terms of the baselines."""

    robust_term: Literal["auto", "cross_entropy", "trades", "mart"] = setting(
        "auto", "classification term: adversarial cross-entropy, or that of TRADES or MART; auto: by method"
    )
    robust_weight: float | None = setting(
        None, "weight of the KL divergence of TRADES or MART; none: the papers' 6 and 5", gt=0
    )
    triplet_weight: float = setting(0.5, "weight of the triplet term, the paper's lambda_1", ge=0)
    norm_weight: float = setting(0.001, "weight of the embedding norms, the paper's lambda_2", ge=0)
    margin: float = setting(0.05, "triplet margin, the paper's alpha, in units of D = 1 - |cos|", ge=0, le=1)
    triplet_layer: Literal["embedding", "logits", "lower", "middle"] = setting(
        "embedding", "layer of the triplets: embedding, logits, or an earlier layer of mnist_cnn (paper, table 10)"
    )
    norm_form: Literal["l2_norms", "mean_squares"] = setting(
        "l2_norms", "paper: sum of L2 norms times lambda_2; code: mean of squares times lambda_2 times lambda_1"
    )
    own_margin_scale: float = setting(1.0, "factor on the margin of triplets with the anchor's own clean image", gt=0)
    reduction: Literal["mean", "sum"] = setting("mean", "reduction over the batch; paper: sum, code: mean")
    label_smoothing: float = setting(0.0, "label smoothing of the cross-entropy", ge=0, lt=1)
    clean_weight: float | None = setting(
        None, "share of the cross-entropy on clean images; none: 1/2 for alp, else 0", ge=0, le=1
    )
    logit_pairing_weight: float = setting(0.5, "alp: weight of the squared logit difference", ge=0)
    embedding_match_weight: float = setting(
        0.0, "weight of the squared distance between clean and adversarial embeddings (the code's match_l2)", ge=0
    )
    view_weight: float = setting(0.0, "share of the label term on a second view (data.augment); 0: none", ge=0, lt=1)
    extra: dict[Function, float] = setting({}, "your own terms and their weights, as {module:function: weight}")


class MiningConfig(Section):
    """Where positives and negatives come from."""

    pool: Literal["batch", "separate"] = setting(
        "batch", "mine in the worker's own clean batch (one forward pass for everything), or in a separate draw"
    )
    pool_size: int = setting(500, "pool separate: images to mine negatives from", unit="images", ge=1)
    scope: Literal["worker", "global"] = setting("worker", "mine in each worker's pool, or across all workers' pools")
    positives: Literal["own", "same_class", "both"] = setting(
        "own", "the anchor's own clean image, another image of its class, or a triplet with each (code)"
    )
    queries: Literal["final", "last_step"] = setting(
        "final",
        "pool separate: query with the embeddings of the final adversarial images, or reuse those of the attack's last "
        "step",
    )
    miner: Function | None = setting(
        None, "your own choice of negatives, as module:function; none: the hardest, or random ones for tla_rn"
    )
    similarity: Literal["cosine", "absolute_cosine"] = setting(
        "absolute_cosine", "nearest by |cos|, the distance of the loss (paper), or by the signed cosine (code)"
    )
    random_negatives: Literal["other_class", "any"] = setting(
        "other_class", "tla_rn draws from other classes, or from all images (code)"
    )
    keep_probability: float = setting(
        1.0,
        "probability that a pool image is available to an anchor; below 1 negatives get easier (the code's --diff_neg)",
        gt=0,
        le=1,
    )
    augment_pool: bool = setting(True, "augment the images of a separate pool")
    clean_noise: Pixels = setting(
        0.0, "uniform noise added to clean images after the attack", unit="pixels in [0, 1]", ge=0, le=1
    )
    clean_noise_on: Literal["own", "all"] = setting(
        "own", "add the noise to the anchors' own clean images (code), or to all clean images (paper)"
    )
    clean_noise_round: bool = setting(False, "round noisy images to 8-bit levels (code)")


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw"] = setting("sgd", "optimizer")
    learning_rate: float = setting(0.1, "initial learning rate", gt=0)
    body_rate: float = setting(
        1.0, "factor on the learning rate of all layers but the last linear one; requires model.pretrained", gt=0, le=1
    )
    momentum: float = setting(0.9, "momentum of sgd, first beta of adam", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov momentum")
    weight_decay: float = setting(0.0, "L2 weight decay", ge=0)
    decay: Literal["kernels", "all"] = setting(
        "kernels", "apply weight decay to convolution and linear kernels only (code), or to all parameters"
    )
    grad_clip: float | None = setting(None, "clip the global L2 norm of the gradient; none: off", gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nesterov and self.name == "sgd" and self.momentum == 0:
            remedy = "leave it out, or set optimizer.momentum above 0"
            raise wrong("optimizer.nesterov", "True", "there is no momentum to look ahead with", remedy)
        return self


class ScheduleConfig(Section):
    """The learning rate schedule."""

    name: Literal["constant", "piecewise", "cosine", "cyclic", "one_cycle"] = setting(
        "constant", "shape of the schedule; cyclic: linear; one_cycle: torch's OneCycleLR"
    )
    milestones: tuple[int, ...] = setting((), "piecewise: multiply by factor at each of these")
    unit: Literal["epoch", "step"] = setting("epoch", "unit of milestones and warmup")
    factor: float = setting(0.1, "piecewise: factor at each milestone", gt=0, lt=1)
    warmup: float = setting(0.0, "length of the linear warm-up", unit="schedule.unit", ge=0)
    peak: float = setting(0.4, "cyclic, one_cycle: share of the run after which the rate peaks", gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.milestones) != sorted(self.milestones):  # a repeated one counts twice, as in torch's MultiStepLR
            raise wrong("schedule.milestones", self.milestones, "not in ascending order", "sort them")
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
    channels_last: bool | None = setting(
        None, "channels-last memory format; faster convolutions on GPUs; none: by speed.mode"
    )
    ema_decay: float | None = setting(
        None, "keep an exponential moving average of the weights with this decay per step, and evaluate it", gt=0, lt=1
    )
    batchnorm_roles: Literal["together", "apart"] = setting(
        "together", "BatchNorm statistics over adversarial and clean images together, or per role (authors' code)"
    )
    freeze_batchnorm: bool = setting(
        False, "keep BatchNorm's statistics, and normalize by them in training too; requires model.pretrained"
    )
    log_every_steps: int = setting(50, "log progress every this many steps", unit="steps", ge=1)
    checkpoint_minutes: float = setting(
        10, "save a checkpoint within an epoch too, once the last is this old", unit="minutes", gt=0
    )


class SpeedConfig(Section):
    """Faster execution of the same step: results change by rounding only. More such settings are in other sections."""

    mode: Literal["auto", "exact"] = setting(
        "auto",
        "what settings left open become; auto: on GPUs channels_last and cuda_graphs; exact: neither, and convolutions "
        "in full float32 instead of TF32",
    )

    fold_batchnorm: bool = setting(
        True, "attack a copy of the network with BatchNorm folded into the preceding convolutions"
    )
    compile: Literal["none", "attack", "all"] = setting(
        "none", "torch.compile the attacked network, or the update too; pays off on GPUs, slower on CPUs"
    )
    cuda_graphs: bool | None = setting(
        None, "capture all steps of the attack in one CUDA graph; GPUs only; none: by speed.mode"
    )
    keep_freed_memory: bool = setting(True, "on a CPU, reuse freed memory between steps instead of returning it")
    fused_optimizer: bool = setting(True, "update all parameters in one kernel")
    overlap_reduction: bool = setting(True, "reduce gradients across workers during the backward pass")
    tune_kernels: bool = setting(False, "cuDNN benchmark mode: picks the fastest kernels; runs then differ in rounding")
