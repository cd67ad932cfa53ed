"""The configuration of a run. Nothing here imports torch, so that a wrong one is refused within a second."""

import hashlib
import json
import math
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from tla_service.config.adversary import AttackConfig
from tla_service.config.cluster import ScalingConfig, TrackingConfig
from tla_service.config.fields import Section, setting, wrong
from tla_service.config.radii import ImageShape, length_trouble, no_radius
from tla_service.config.sections import DataConfig, DetectionConfig, EvaluationConfig, ModelConfig
from tla_service.config.training import (
    LossConfig,
    MiningConfig,
    OptimizerConfig,
    ScheduleConfig,
    SpeedConfig,
    TrainingConfig,
)
from tla_service.errors import ConfigError

Method = Literal["natural", "at", "alp", "tla", "tla_rn", "tla_sa", "trades", "mart"]
RobustTerm = Literal["cross_entropy", "trades", "mart"]
TRIPLET_METHODS = ("tla", "tla_rn", "tla_sa")
# Weights of the KL divergence in the papers (Zhang et al. 2019, section 5; Wang et al. 2020, section 4).
_ROBUST_WEIGHTS = {"cross_entropy": 0.0, "trades": 6.0, "mart": 5.0}
_NO_GRADIENT = "the divergence of an image from itself has no gradient"


class RunConfig(Section):
    """One training run, complete: logged with it, and enough to start it again."""

    # Settings that change neither the weights, up to rounding, nor their selection: a run may resume with other values.
    # How the computation is distributed over workers and batches counts as rounding.
    NOT_IDENTITY: ClassVar[dict[str, Any]] = {
        "name": True,
        "scaling": True,
        "speed": True,
        "tracking": True,
        # Checkpoints hold fingerprints of the network's code, the validation split and the extra images.
        "model": {"code"},
        "data": dict.fromkeys(
            ("root", "download", "cache_dir", "residency", "loader_workers", "test_limit", "validation"), True
        )
        | {"extra": {"path"}},
        "training": {"channels_last", "checkpoint_minutes", "log_every_steps"},
        "evaluation": {"test", "batch_size"},
        "detection": True,
    }

    name: str = setting(
        "",
        "run name; default: data set, method, seed and a digest of the configuration",
        pattern=r"^([\w-][\w.-]*)?$",
        max_length=240,
    )
    method: Method = setting("tla", "training method")
    seed: int = setting(0, "seed of the split, data order, initial weights and all random draws", ge=0, lt=2**31)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: AttackConfig = AttackConfig()
    loss: LossConfig = LossConfig()
    mining: MiningConfig = MiningConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    speed: SpeedConfig = SpeedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    detection: DetectionConfig = DetectionConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def mines_triplets(self) -> bool:
        """Whether the method has a triplet term."""
        return self.method in TRIPLET_METHODS

    @property
    def robust_term(self) -> RobustTerm:
        """The classification term; the method's own unless set."""
        by_method: RobustTerm = self.method if self.method in ("trades", "mart") else "cross_entropy"
        return by_method if self.loss.robust_term == "auto" else self.loss.robust_term

    @property
    def robust_weight(self) -> float:
        """Weight of the KL divergence in the classification term."""
        given = self.loss.robust_weight
        return _ROBUST_WEIGHTS[self.robust_term] if given is None else given

    @property
    def selected_by(self) -> Literal["robust_accuracy", "clean_accuracy"]:
        """The validation accuracy that selects the best weights; the other one decides between equals.

        Under attack, natural training is best before it has learned anything.
        """
        return "clean_accuracy" if self.method == "natural" else "robust_accuracy"

    @property
    def attack_objective(self) -> Literal["cross_entropy", "kl"]:
        """The loss that the training attack maximizes."""
        if self.attack.objective != "auto":
            return self.attack.objective
        return "kl" if self.robust_term == "trades" else "cross_entropy"

    @property
    def extra_per_step(self) -> int:
        """Extra images in each global batch."""
        batch = self.training.global_batch_size
        return batch - round(batch * (1 - (self.data.extra.share or 0)))

    @property
    def own_functions(self) -> dict[str, str]:
        """Functions from outside the package, as `module:function`, by the field that names them."""
        attacks = {f"{where}.kind": attack.kind for where, attack in self.evaluation.attacks.items()}
        terms = {f"loss.extra.{path}": path for path in self.loss.extra}
        named = {"attack.kind": self.attack.kind, **attacks, "mining.miner": self.mining.miner or "", **terms}
        return {where: path for where, path in named.items() if ":" in path}

    @property
    def uses_own_code(self) -> bool:
        """Whether its network or a function is from outside the package and its libraries."""
        of_libraries = ":" not in self.model.name or self.model.name.startswith(("timm:", "torchvision:"))
        return not of_libraries or bool(self.own_functions)

    @property
    def digest(self) -> str:
        """Eight hex digits of everything that shapes the trained weights."""
        # Only of what differs from the defaults, so that a setting added by a later version changes no digest.
        dumped = self.model_dump(mode="json", exclude=self.NOT_IDENTITY, exclude_defaults=True)
        model = dumped.get("model", {})
        if "pretrained" in model:
            model["weights"] = model.pop("pretrained")  # its name when the first digests were made
        fields = {name: value for name, value in dumped.items() if value != {}}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        """The given name, or one made of what identifies the run, never of the time."""
        return self.name or f"{self.name_stem}-{self.digest}"

    @property
    def name_stem(self) -> str:
        """The default name without the digest."""
        return f"{self.data.name}-{self.method}-s{self.seed}"

    @property
    def registered_model(self) -> str | None:
        """Name in the model registry; None if the model is not to be registered."""
        name = self.tracking.registered_model
        return f"tla-{self.data.name.replace('_', '-')}" if name is None else name or None

    @property
    def watches_collapse(self) -> bool:
        """Whether training with a single-step attack stops or goes on with PGD after catastrophic overfitting."""
        attack = self.attack
        is_single_step = attack.kind in ("n_fgsm", "free") or attack.num_steps == 1
        return self.method != "natural" and is_single_step and attack.on_collapse != "ignore"

    def attack_trouble(self, shape: ImageShape | None) -> ConfigError | None:
        """What is wrong with attacks when a run begins: lengths on images (C, H, W), if that is known."""
        # Not when a configuration is read back: runs older than this check must still load.
        own, steps = self.attack, self.attack.num_steps if self.attack.kind == "pgd" else None
        if not own.random_start and own.kind in ("n_fgsm", "free"):
            return ConfigError("attack.random_start", False, f"attack.kind {own.kind} starts at noise", "leave it out")
        trouble = length_trouble("attack", own.norm, own.epsilon, own.step_size, steps, shape)
        for where, attack in self.evaluation.attacks.items():
            norm, epsilon, step_size = attack.lengths(own, self.data.name)
            if epsilon is None:
                reason, remedy = no_radius(self.data.name, norm, f"{where}.epsilon")
                return trouble or ConfigError(f"{where}.norm", norm, reason, remedy)
            own_step = None if attack.kind == "fgsm" else step_size
            trouble = trouble or length_trouble(where, norm, epsilon, own_step, attack.num_steps, shape)
        return trouble

    def on_device(self, *, has_gpu: bool) -> Self:
        """This run on workers with or without GPUs: the settings left to `speed.mode` have their values."""
        fast = has_gpu and self.speed.mode == "auto"
        # Networks and attacks from outside may do what a graph cannot capture, or rely on the usual memory format.
        foreign = ":" in self.model.name and not self.model.name.startswith("torchvision:")
        attacks = self.method != "natural" and self.attack.kind == "pgd" and self.attack.batchnorm == "eval"
        training, speed = self.training, self.speed
        if training.channels_last is None:
            training = training.model_copy(update={"channels_last": fast and not self.uses_own_code})
        if speed.cuda_graphs is None:
            speed = speed.model_copy(update={"cuda_graphs": fast and attacks and not (foreign or self.data.cutmix)})
        return self.model_copy(update={"training": training, "speed": speed})

    def check_device(self, *, has_gpu: bool) -> None:
        """Raise ConfigError for CUDA graphs without a GPU, which may be known late."""
        if self.speed.cuda_graphs and not has_gpu:
            remedy = "leave it out, or run where there is a GPU"
            raise ConfigError("speed.cuda_graphs", True, "CUDA graphs need a GPU, and this run has none", remedy)

    def check_workers(self, fewest: int, most: int | None = None) -> None:
        """Raise ConfigError if a step cannot be split over so many workers, or any number of them up to `most`."""
        batch, mining, workers = self.training.global_batch_size, self.mining, most or fewest
        sizes = range(fewest, workers + 1)
        if batch < 2 * workers:
            reason, remedy = f"under 2 images for each of {workers} workers", f"use at least {2 * workers}"
            raise ConfigError("training.global_batch_size", batch, reason, f"{remedy}, or fewer workers")
        shared = self.mines_triplets and mining.scope == "global" and mining.pool == "separate"
        wrong_size = next((size for size in sizes if mining.pool_size % size), None) if shared else None
        if wrong_size is not None:
            below = mining.pool_size // workers * workers
            reason = f"not divisible by {wrong_size} workers with mining.scope=global"
            remedy = f"use {below} or {below + workers}" if below else f"use {workers}"
            if len(sizes) > 1:
                remedy = f"use a multiple of {math.lcm(*sizes)}, or " if len(sizes) < 16 else ""
                remedy += "give scaling.num_workers a narrower range"
            raise ConfigError("mining.pool_size", mining.pool_size, reason, remedy)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scaling.num_workers != "auto":
            try:
                self.check_workers(*self.scaling.bounds(auto=1))
            except ConfigError as error:
                raise wrong(*error.args) from None
        for field, reason, remedy in self._contradictions():
            raise wrong(field, attrgetter(field)(self), reason, remedy)
        if self.data.root is None and self.data.name != "digits":
            reason = f"{self.data.name} does not ship with the installation"
            raise wrong("data.root", None, reason, "give a folder, or s3://bucket/prefix")
        return self

    def _contradictions(self) -> Iterator[tuple[str, str, str]]:
        """Settings that contradict the method or one another: field, reason, remedy."""
        method, term, loss = self.method, self.robust_term, self.loss
        if self.model.code is not None and not self.uses_own_code:
            reason = f"{self.model.name} is not a network of your own, and no attack, loss term or miner is"
            yield "model.code", reason, "leave it out, or name one of its functions, as in model.name or attack.kind"
        if self.mines_triplets and loss.triplet_weight == 0:
            reason = f"method {method} trains a triplet term"
            yield "loss.triplet_weight", reason, "give a weight above 0, or use method at"
        if method == "alp" and loss.logit_pairing_weight == 0:
            yield "loss.logit_pairing_weight", "method alp pairs logits", "give a weight above 0, or use method at"
        own_term = {**dict.fromkeys(("natural", "at", "alp"), "cross_entropy"), "trades": "trades", "mart": "mart"}
        if term != own_term.get(method, term):
            reason = f"method {method} has its own classification term"
            yield "loss.robust_term", reason, f"set it to auto, or use method {term} or tla"
        if loss.clean_weight and term != "cross_entropy":
            reason = f"the {term} term has its own share of clean images"
            yield "loss.clean_weight", reason, "leave it out, or set loss.robust_weight"
        if loss.robust_weight is not None and term == "cross_entropy":
            reason, remedy = f"method {method} has no divergence to weight", "set loss.robust_term to trades or mart"
            yield "loss.robust_weight", reason, f"leave it out, or {remedy}"
        of_fine_tuning = {"model.head": "keep", "optimizer.body_rate": 1, "training.freeze_batchnorm": False}
        for field, default in of_fine_tuning.items():
            if self.model.pretrained is None and attrgetter(field)(self) != default:
                yield field, "the network starts from random weights", "leave it out, or set model.pretrained"
        yield from self._contradictions_of_layers()
        yield from self._contradictions_of_extra_images()
        yield from self._contradictions_of_the_attack()

    def _contradictions_of_layers(self) -> Iterator[tuple[str, str, str]]:
        layer = self.loss.triplet_layer
        if layer != "embedding" and not self.mines_triplets:
            yield "loss.triplet_layer", f"method {self.method} has no triplets", "leave it out, or use method tla"
        if layer in ("lower", "middle") and self.model.embedding is not None:
            yield "loss.triplet_layer", "model.embedding names another layer for triplets", "leave one of them out"

    def _contradictions_of_extra_images(self) -> Iterator[tuple[str, str, str]]:
        extra, batch = self.data.extra, self.training.global_batch_size
        if (extra.path is None) != (extra.share is None):
            reason = "not set with" if extra.share is None else "set without"
            yield "data.extra.share", f"{reason} data.extra.path", "set both, or neither"
        elif extra.share is not None and self.extra_per_step in (0, batch):
            reason = f"of {batch} images, {self.extra_per_step} would be extra images"
            yield "data.extra.share", reason, "use a larger training.global_batch_size"
        elif extra.share is not None and self.data.balance == "class_weights":
            yield "data.balance", "the training images' weights do not fit those of data.extra", "use sampling"
        elif extra.share is not None and self.mines_triplets and self.mining.pool == "separate":
            yield "mining.pool", "its images would not include those of data.extra", "use batch"

    def _contradictions_of_the_attack(self) -> Iterator[tuple[str, str, str]]:
        attack, mining = self.attack, self.mining
        if self.attack_objective == "kl" and not attack.random_start and attack.kind == "pgd":
            yield "attack.random_start", _NO_GRADIENT, "set it to true, or attack.objective to cross_entropy"
        if self.attack_objective == "kl" and attack.noise == 0 and attack.kind == "n_fgsm":
            yield "attack.noise", _NO_GRADIENT, "set a value above 0, or attack.objective to cross_entropy"
        reuses = self.mines_triplets and mining.pool == "separate" and mining.queries == "last_step"
        if reuses and attack.kind == "free":
            reason = "free training takes no attack steps before mining"
            yield "mining.queries", reason, "use final, or another attack.kind"
        if attack.batchnorm == "train" and self.training.freeze_batchnorm:
            yield "attack.batchnorm", "training.freeze_batchnorm keeps BatchNorm in eval mode", "leave one of them out"
        if attack.awp and self.method == "natural":
            yield "attack.awp", "method natural has no attack", "leave it out, or use method at"
        if self.scaling.async_validation and self.watches_collapse:
            reason = "attack.on_collapse acts on an epoch's validation before the next epoch"
            yield "scaling.async_validation", reason, "leave it out, or set attack.on_collapse to ignore"
        yield from self._contradictions_of_views()
        yield from self._contradictions_of_own_functions()

    def _contradictions_of_views(self) -> Iterator[tuple[str, str, str]]:
        data, weight = self.data, self.loss.view_weight
        if weight and data.augment == "none" and not data.cutmix:
            reason = "the second view would have no augmentation of its own"
            yield "loss.view_weight", reason, "set data.augment or data.cutmix"
        if weight and self.training.batchnorm_roles == "together":
            reason = "a second view has BatchNorm statistics of its own (loss.view_weight)"
            yield "training.batchnorm_roles", reason, "use apart"
        if weight and self.attack.kind == "free":
            reason = "free training has one backward pass for images and weights, a second view needs another"
            yield "loss.view_weight", reason, "leave it out, or use attack.kind pgd"
        if weight and self.speed.compile == "all":
            reason = "a compiled update has not been verified with a second view"
            yield "speed.compile", reason, "use attack, or set loss.view_weight to 0"
        if data.cutmix:
            yield from self._contradictions_of_cutmix()

    def _contradictions_of_cutmix(self) -> Iterator[tuple[str, str, str]]:
        data, weight = self.data, self.loss.view_weight
        if self.mines_triplets and not weight:
            reason = "a triplet compares images of one class, and CutMix makes images of two"
            yield "data.cutmix", reason, "set loss.view_weight, so that only the second view is mixed"
        if self.robust_term == "mart":
            yield "data.cutmix", "MART's term needs images of one class", "use another loss.robust_term"
        if data.balance == "class_weights":
            yield "data.balance", "a class weight needs images of one class", "use sampling, or leave out data.cutmix"
        if ":" in self.attack.kind or (self.loss.extra and not weight):
            yield "data.cutmix", "your own attack or loss term takes one class per image", "leave one of them out"
        if self.speed.cuda_graphs:
            yield "speed.cuda_graphs", "the captured attack takes one class per image", "leave it out"

    def _contradictions_of_own_functions(self) -> Iterator[tuple[str, str, str]]:
        attack, mining = self.attack, self.mining
        own = ":" in attack.kind
        if own and self.mines_triplets and mining.pool == "separate" and mining.queries == "last_step":
            yield "mining.queries", "your own attack may take its last step with part of the images", "use final"
        if own and attack.batchnorm == "train":
            reason = "your own attack runs on a copy of the network, in eval mode"
            yield "attack.batchnorm", reason, "use eval, or attack.kind pgd"
        if own and self.speed.cuda_graphs:
            remedy = "leave it out, or use attack.kind pgd"
            yield "speed.cuda_graphs", "your own attack cannot be captured in a CUDA graph", remedy
        if mining.miner is not None and self.method not in ("tla", "tla_sa"):
            yield "mining.miner", f"method {self.method} mines no negatives", "leave it out, or use method tla"
        if mining.miner is not None and mining.keep_probability < 1:
            yield "mining.keep_probability", "your own miner gets the whole pool", "leave it out, or draw in the miner"
