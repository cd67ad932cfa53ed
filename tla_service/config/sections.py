"""The sections of a run, except for its attack."""

import math
import re
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from tla_service.config.adversary import EvaluationAttack
from tla_service.config.fields import (
    Function,
    Pixels,
    Section,
    model_trouble,
    name_trouble,
    setting,
    tag_trouble,
    wrong,
)
from tla_service.errors import ConfigError

DatasetName = Literal[
    "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "image_folder", "parquet"
]


class ExtraConfig(Section):
    """Synthetic or other additional images with labels, in every training batch."""

    path: str | None = setting(None, "npz file, Parquet file or folder of them, or s3://...; none: off", min_length=1)
    share: float | None = setting(None, "share of each batch that is extra images; published: 0.7", gt=0, lt=1)
    duplicates: Literal["refuse", "drop"] = setting("refuse", "near-duplicates of validation and test images")


class DataConfig(Section):
    """The data set, its splits and augmentation."""

    name: DatasetName = setting("digits", "data set; digits ships with the installation")
    root: str | None = setting(None, "folder, zip file or s3://bucket/prefix with the data set")
    download: bool = setting(False, "download the data set into data.root if it is missing (torchvision data sets)")
    cache_dir: str = setting("~/.cache/tla-service", "cache of s3:// roots and unpacked archives, per node")
    train: str | None = setting(None, "name of the training split; none: train; .: the root itself", min_length=1)
    validation: str | None = setting(None, 'name of the validation split; none: a common name; "": hold one out')
    test: str | None = setting(None, "name of the test split; none: test, or a common name", min_length=1)
    validation_fraction: Pixels = setting(0.1, "share of the training set held out for validation", gt=0, le=0.5)
    test_fraction: Pixels | None = setting(None, "share of the training set held out for testing", gt=0, le=0.5)
    train_limit: int | None = setting(None, "use only this many training images (stratified)", unit="images", ge=2)
    test_limit: int | None = setting(None, "use only this many test images (stratified)", unit="images", ge=1)
    image_size: int | None = setting(None, "resize to this side; required by image_folder", unit="pixels", ge=4)
    label_column: str | None = setting(
        None, "label column of parquet files; none: label, labels, fine_label, target or class", min_length=1
    )
    image_column: str | None = setting(
        None, "column of encoded images in parquet files; none: the only one, or one with a common name", min_length=1
    )
    balance: Literal["none", "class_weights", "sampling"] = setting(
        "none", "unbalanced classes: weight each class in the loss, or draw from every class equally often"
    )
    extra: ExtraConfig = ExtraConfig()
    crop_padding: int = setting(0, "random crop after zero padding of this size; 0: off", unit="pixels", ge=0, le=64)
    flip: bool = setting(False, "random horizontal flip")
    saturation: float = setting(1.0, "random saturation factor in [1/s, s]; 1: off", ge=1, le=10)
    augment: Literal["none", "autoaugment", "randaugment"] = setting(
        "none",
        "strong augmentation, before crop and flip: AutoAugment's policy for CIFAR-10, or RandAugment; of all images, "
        "or with loss.view_weight of the second view only",
    )
    cutmix: bool = setting(
        False, "CutMix: a box of another image, and its share of the label; of all images, or of the second view only"
    )
    residency: Literal["auto", "device", "stream"] = setting(
        "auto", "keep all images on the device as uint8, or stream them through data loaders; auto: by size"
    )
    loader_workers: int = setting(2, "data loader processes per worker when streaming", ge=0, le=128)

    @property
    def resizes_files(self) -> bool:
        """Whether images are files of any size, which are resized as a registered model resizes what it is sent."""
        return self.image_size is not None and self.name in ("tiny_imagenet", "image_folder", "parquet")


class ModelConfig(Section):
    """The network."""

    name: str = setting(
        "digits_cnn",
        "network: digits_cnn, small_cnn, mnist_cnn, mnist_mlp, wrn_32_10, wrn_28_10, wrn_34_10, preact_resnet_18, "
        "tiny_resnet50_stride2, tiny_resnet50_stride1, tiny_resnet20_stride1, torchvision:NAME, timm:NAME, or "
        "package.module:factory",
    )
    code: str | None = setting(
        None, "folder with the modules of package.module:factory, which travels with the run; none: it is installed"
    )
    embedding: str | None = setting(
        None, "layer whose output is the embedding, such as layer4; none: the input of the last linear layer"
    )
    normalization: Literal["default", "none", "per_image", "cifar10", "imagenet"] = setting(
        "default", "input normalization inside the network; default: the network's own"
    )
    activation: Literal["default", "relu", "silu"] = setting(
        "default", "activation of wrn_* and preact_resnet_18; default: the network's own, which is ReLU or leaky ReLU"
    )
    pretrained: str | None = setting(
        None,
        "weights to start from: a safetensors or PyTorch file, a checkpoint folder, models:/..., runs:/..., or "
        "torchvision[:WEIGHTS] or timm[:TAG], whose weights must be in the library's cache; none: random",
        min_length=1,
    )
    head: Literal["keep", "new"] = setting(
        "keep", "pretrained: keep the last linear layer, or draw a new one, as another number of classes requires"
    )

    @model_validator(mode="before")
    @classmethod
    def _take_old_name(cls, values: Any) -> Any:
        """`model.weights` of earlier versions, whose configurations have it."""
        if not isinstance(values, dict) or "weights" not in values:
            return values
        values = dict(values)
        old = values.pop("weights")
        if old is None:
            return values
        if values.get("pretrained") not in (None, old):
            raise wrong("model.weights", old, "model.pretrained, its new name, is set too", "leave it out")
        return {**values, "pretrained": old}


class EvaluationConfig(Section):
    """Model selection (on the validation split) and testing (once, at the end). Always in float32."""

    validation: EvaluationAttack = setting(
        EvaluationAttack(), "attack on the validation split, selects the best weights"
    )
    validation_limit: int | None = setting(None, "attack only this many validation images", unit="images", ge=1)
    validation_margin: bool = setting(
        False,
        "attack validation images with PGD on the logit margin as well, and count what withstands both; cross-entropy "
        "alone overrates some settings",
    )
    every_epochs: int = setting(1, "validate every this many epochs, and after the last", unit="epochs", ge=1)
    test: dict[str, EvaluationAttack] = setting(
        {"fgsm": EvaluationAttack(kind="fgsm"), "pgd20": EvaluationAttack()}, "attacks on the test set, by name"
    )
    batch_size: int = setting(500, "images per forward pass, per worker", unit="images", ge=1)

    @property
    def attacks(self) -> dict[str, EvaluationAttack]:
        """All attacks by the field that holds them."""
        test = {f"evaluation.test.{name}": attack for name, attack in self.test.items()}
        return {"evaluation.validation": self.validation, **test}


class DetectionConfig(Section):
    """The misclassification detector of a registered model: class-conditional Gaussians over training embeddings."""

    covariance: Literal["tied", "full", "diagonal"] = setting(
        "tied", "one covariance shared by all classes, one per class (size grows with the classes), or variances only"
    )
    false_rejection_rate: float = setting(
        0.05, "maximum share of correctly classified validation images that the threshold rejects", ge=0, lt=1
    )
    training_limit: int = setting(20_000, "fit on at most this many training images", unit="images", ge=2)


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
        None, "storage of checkpoints: a shared folder or s3://bucket/prefix; none: the output folder"
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
    experiment: str = setting("tla", "MLflow experiment", min_length=1)
    registered_model: str | None = setting(
        None, 'name to register the best weights under; none: tla-<data.name>; "": do not register'
    )
    tags: dict[str, str] = setting({}, "additional tags of the run")

    def trouble(self) -> ConfigError | None:
        """What MLflow would refuse. Checked when a run begins, not when a configuration is read back."""
        found = [name_trouble("tracking.experiment", self.experiment)]
        found += [tag_trouble("tracking.tags", key, value) for key, value in self.tags.items()]
        if self.registered_model:
            found.append(model_trouble("tracking.registered_model", self.registered_model))
        return next(filter(None, found), None)
