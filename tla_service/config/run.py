"""What a run is: frozen, validated sections. Reading them from presets, files and flags is `config.loading`'s job.

Nothing here imports torch, so that a wrong configuration is refused within a second, on any machine.
"""

import hashlib
import json
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from tla_service.config.adversary import AttackConfig, EvaluationAttack
from tla_service.config.bounds import ImageShape, length_trouble
from tla_service.config.fields import Pixels, Section, Trouble, setting, wrong
from tla_service.config.names import experiment_trouble, model_trouble, tag_trouble
from tla_service.config.radii import no_radius
from tla_service.config.training import OptimizerConfig, ScheduleConfig, SpeedConfig, TrainingConfig
from tla_service.errors import ConfigError

Method = Literal["natural", "at", "alp", "tla", "tla_rn", "tla_sa", "trades", "mart"]
DatasetName = Literal[
    "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "image_folder", "parquet"
]
RobustTerm = Literal["cross_entropy", "trades", "mart"]
TRIPLET_METHODS = ("tla", "tla_rn", "tla_sa")
# The papers' weights of the divergence (Zhang et al. 2019, section 5; Wang et al. 2020, section 4).
ROBUST_WEIGHTS = {"cross_entropy": 0.0, "trades": 6.0, "mart": 5.0}


class DataConfig(Section):
    """Where images come from, how they are split and augmented."""

    name: DatasetName = setting("digits", "data set; digits comes with the installation")
    root: str | None = setting(None, "folder, zip file or s3://bucket/prefix that holds the data set")
    download: bool = setting(False, "fetch the data set into data.root when it is not there (torchvision's sets only)")
    cache_dir: str = setting(
        "~/.cache/tla-service", "where copies of s3:// roots and unpacked archives are kept, per node"
    )
    validation_fraction: Pixels = setting(0.1, "share of the training set held out for validation", gt=0, le=0.5)
    train_limit: int | None = setting(None, "use only this many training images (stratified)", unit="images", ge=2)
    test_limit: int | None = setting(None, "use only this many test images (stratified)", unit="images", ge=1)
    image_size: int | None = setting(None, "resize to this side; needed for image_folder", unit="pixels", ge=4)
    label_column: str | None = setting(
        None,
        "column of labels in parquet files; none: one called label, labels, fine_label, target or class",
        min_length=1,
    )
    image_column: str | None = setting(
        None, "column of encoded images in parquet files; none: the only one, or one with a usual name", min_length=1
    )
    crop_padding: int = setting(0, "random crop after zero padding by this much; 0 is off", unit="pixels", ge=0, le=64)
    flip: bool = setting(False, "random horizontal flip")
    saturation: float = setting(1.0, "random saturation factor in [1/s, s]; 1 is off", ge=1, le=10)
    residency: Literal["auto", "device", "stream"] = setting(
        "auto", "keep all images on the device as uint8, or stream them through loaders; auto goes by size"
    )
    loader_workers: int = setting(2, "loader processes per worker when streaming", ge=0, le=128)


class ModelConfig(Section):
    """The network."""

    name: str = setting(
        "digits_cnn",
        "network: digits_cnn, small_cnn, mnist_cnn, mnist_mlp, wrn_32_10, wrn_28_10, wrn_34_10, preact_resnet_18, "
        "tiny_resnet50_stride2, tiny_resnet50_stride1, tiny_resnet20_stride1, or torchvision:NAME",
    )
    normalization: Literal["default", "none", "per_image", "cifar10", "imagenet"] = setting(
        "default", "input normalisation inside the network; default is the network's own"
    )
    weights: str | None = setting(None, "start from these weights: a checkpoint folder, runs:/... or models:/...")


class EvaluationConfig(Section):
    """How models are chosen (validation split) and measured (test set, once, at the end). Always float32."""

    validation: EvaluationAttack = setting(
        EvaluationAttack(), "attack on the validation split: it chooses the best weights"
    )
    validation_limit: int | None = setting(None, "attack only this many validation images", unit="images", ge=1)
    every_epochs: int = setting(1, "validate every this many epochs, and after the last", unit="epochs", ge=1)
    test: dict[str, EvaluationAttack] = setting(
        {"fgsm": EvaluationAttack(kind="fgsm"), "pgd20": EvaluationAttack()}, "attacks on the test set, by name"
    )
    batch_size: int = setting(500, "images a forward pass, per worker", unit="images", ge=1)

    @property
    def attacks(self) -> dict[str, EvaluationAttack]:
        """All attacks by the field that holds them."""
        test = {f"evaluation.test.{name}": attack for name, attack in self.test.items()}
        return {"evaluation.validation": self.validation, **test}


class DetectionConfig(Section):
    """The detector of misclassified images that a registered model carries: Gaussians over training embeddings."""

    covariance: Literal["tied", "full", "diagonal"] = setting(
        "tied", "one covariance for all classes, one a class (its size grows with them), or variances only"
    )
    false_rejection_rate: float = setting(
        0.05, "share of correctly classified validation images that the threshold rejects at most", ge=0, lt=1
    )
    training_limit: int = setting(20_000, "fit to at most this many training images", unit="images", ge=2)


class LossConfig(Section):
    """Cross-entropy on adversarial images, the triplet term, the norm penalty, and what the baselines add."""

    robust_term: Literal["auto", "cross_entropy", "trades", "mart"] = setting(
        "auto", "term on labels: adversarial cross-entropy, or that of TRADES or MART; auto: by the method"
    )
    robust_weight: float | None = setting(
        None, "weight of the divergence in TRADES' or MART's term; none: the papers', 6 and 5", gt=0
    )
    triplet_weight: float = setting(0.5, "weight of the triplet term, the paper's lambda_1", ge=0)
    norm_weight: float = setting(0.001, "weight of the embedding norms, the paper's lambda_2", ge=0)
    margin: float = setting(
        0.05, "margin of the triplet hinge, the paper's alpha, in units of D = 1 - |cos|", ge=0, le=1
    )
    triplet_layer: Literal["embedding", "logits", "lower", "middle"] = setting(
        "embedding",
        "what triplets are made of: the embedding, the logits, or with model.name mnist_cnn an earlier layer "
        "(the paper's table 10)",
    )
    norm_form: Literal["l2_norms", "mean_squares"] = setting(
        "l2_norms", "paper: sum of L2 norms times lambda_2; code: mean of squares times lambda_2 times lambda_1"
    )
    own_margin_scale: float = setting(1.0, "factor on the margin of triplets with the anchor's own clean image", gt=0)
    reduction: Literal["mean", "sum"] = setting("mean", "over the batch; paper: sum, code: mean")
    label_smoothing: float = setting(0.0, "label smoothing of the cross-entropy", ge=0, lt=1)
    clean_weight: float | None = setting(
        None, "share of the cross-entropy on clean images; none: 1/2 for alp, else 0", ge=0, le=1
    )
    logit_pairing_weight: float = setting(0.5, "weight of the squared logit difference of method alp", ge=0)
    embedding_match_weight: float = setting(
        0.0, "weight of the squared distance of clean and adversarial embeddings (the code's match_l2)", ge=0
    )


class MiningConfig(Section):
    """Where positives and negatives come from."""

    pool: Literal["batch", "separate"] = setting(
        "batch", "mine in the worker's own clean batch (one forward pass serves all), or in a separate draw"
    )
    pool_size: int = setting(500, "images a negative is mined from, with pool: separate", unit="images", ge=1)
    scope: Literal["worker", "global"] = setting(
        "worker", "mine in the worker's pool, or in all workers' pools together"
    )
    positives: Literal["own", "same_class", "both"] = setting(
        "own", "the anchor's own clean image, another image of its class, or a triplet with each (the code)"
    )
    queries: Literal["final", "last_step"] = setting(
        "final",
        "what a separate pool is searched with: embeddings of the final adversarial images, or those that the attack's "
        "last step has computed anyway",
    )
    similarity: Literal["cosine", "absolute_cosine"] = setting(
        "absolute_cosine", "closest by |cos|, the loss's own distance (paper), or by the signed cosine (code)"
    )
    random_negatives: Literal["other_class", "any"] = setting(
        "other_class", "what tla_rn draws from: other classes, or all images as the authors' code does"
    )
    keep_probability: float = setting(
        1.0,
        "chance that a pool image is offered to an anchor; below 1 negatives get easier (the code's --diff_neg)",
        gt=0,
        le=1,
    )
    augment_pool: bool = setting(True, "augment the images of a separate pool")
    clean_noise: Pixels = setting(
        0.0, "uniform noise added to clean images after the attack", unit="pixels in [0, 1]", ge=0, le=1
    )
    clean_noise_on: Literal["own", "all"] = setting(
        "own", "noise on the anchors' own clean images (code) or all clean ones (paper)"
    )
    clean_noise_round: bool = setting(False, "round noisy images to 8-bit levels, as the authors' code does")


class ScalingConfig(Section):
    """Workers and where they run."""

    num_workers: int | Literal["auto"] = setting("auto", "DDP processes; auto: all GPUs of the cluster, else 2 on CPUs")
    use_gpu: bool | Literal["auto"] = setting("auto", "one GPU share per worker; auto: when the cluster has GPUs")
    cpus_per_worker: float = setting(1, "CPU cores reserved per worker", unit="cores", gt=0)
    gpus_per_worker: float = setting(1, "GPU share per worker; below 1 several share a GPU", unit="GPUs", gt=0)
    max_failures: int = setting(3, "restarts from the last checkpoint before the run gives up", ge=0)
    storage: str | None = setting(
        None, "where checkpoints go: a shared folder or s3://bucket/prefix; none: the output folder"
    )
    wait_seconds: float = setting(
        0,
        "wait this long for workers that the cluster cannot place yet (autoscaling); 0 refuses them",
        unit="seconds",
        ge=0,
    )
    address: str | None = setting(None, "Ray cluster to join; none: RAY_ADDRESS, else a local one for this run")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.num_workers, int) and self.num_workers < 1:
            raise wrong("scaling.num_workers", self.num_workers, "below 1", "give the number of processes, or auto")
        return self


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = setting(None, "tracking server; none: MLFLOW_TRACKING_URI, else an SQLite file mlflow.db here")
    experiment: str = setting("tla", "MLflow experiment", min_length=1)
    registered_model: str | None = setting(
        None, 'name to register the best weights under; none: tla-<data.name>; "": do not register'
    )
    tags: dict[str, str] = setting({}, "extra tags on the run")

    def trouble(self) -> Trouble | None:
        """What is wrong with names that MLflow will be given. Asked where a run begins, not where one is read."""
        found = [experiment_trouble("tracking.experiment", self.experiment)]
        found += [tag_trouble("tracking.tags", key, value) for key, value in self.tags.items()]
        if self.registered_model:
            found.append(model_trouble("tracking.registered_model", self.registered_model))
        return next(filter(None, found), None)


class RunConfig(Section):
    """One training run, complete: what is logged with it, and what starts it again."""

    # What shapes neither the trained weights, but for rounding, nor the choice of the best: a run may resume with other
    # values of these. How a computation is distributed over workers and batches counts as rounding.
    NOT_IDENTITY: ClassVar[dict[str, Any]] = {
        "name": True,
        "scaling": True,
        "speed": True,
        "tracking": True,
        "data": {"root", "download", "cache_dir", "residency", "loader_workers", "test_limit"},
        "training": {"channels_last", "log_every_steps"},
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
    seed: int = setting(0, "seed of the split, the order, the initial weights and every random draw", ge=0, lt=2**31)
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
        """The term on labels, by the method where it is not set."""
        by_method: RobustTerm = self.method if self.method in ("trades", "mart") else "cross_entropy"
        return by_method if self.loss.robust_term == "auto" else self.loss.robust_term

    @property
    def robust_weight(self) -> float:
        """Weight of the divergence in the term on labels."""
        given = self.loss.robust_weight
        return ROBUST_WEIGHTS[self.robust_term] if given is None else given

    @property
    def attack_objective(self) -> Literal["cross_entropy", "kl"]:
        """What the training attack ascends: TRADES its divergence, all others the cross-entropy."""
        if self.attack.objective != "auto":
            return self.attack.objective
        return "kl" if self.robust_term == "trades" else "cross_entropy"

    @property
    def digest(self) -> str:
        """Eight hex digits of everything that shapes the trained weights.

        Of what differs from the defaults only, so that a setting that a later version adds changes no digest.
        """
        dumped = self.model_dump(mode="json", exclude=self.NOT_IDENTITY, exclude_defaults=True)
        fields = {name: value for name, value in dumped.items() if value != {}}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        """The run's name: given, or made of what identifies it, never of the time."""
        return self.name or f"{self.name_stem}-{self.digest}"

    @property
    def name_stem(self) -> str:
        """What a name that is made begins with."""
        return f"{self.data.name}-{self.method}-s{self.seed}"

    @property
    def registered_model(self) -> str | None:
        """Name in the model registry, or ``None`` when the run is not to be registered."""
        name = self.tracking.registered_model
        return f"tla-{self.data.name.replace('_', '-')}" if name is None else name or None

    def attack_trouble(self, shape: ImageShape | None) -> Trouble | None:
        """What is wrong with the lengths of its attacks, on images of a shape (C, H, W) if that is known.

        Asked where a run begins, not where one is read: what was trained before this was checked must still load.
        """
        own, steps = self.attack, self.attack.num_steps if self.attack.kind == "pgd" else None
        found = [length_trouble("attack", own.norm, own.epsilon, own.step_size, steps, shape)]
        for where, attack in self.evaluation.attacks.items():
            norm, epsilon, step_size = attack.lengths(own, self.data.name)
            if epsilon is None:
                found.append(Trouble(f"{where}.norm", norm, *no_radius(self.data.name, norm, f"{where}.epsilon")))
                continue
            own_step = None if attack.kind == "fgsm" else step_size
            found.append(length_trouble(where, norm, epsilon, own_step, attack.num_steps, shape))
        return next(filter(None, found), None)

    def check_device(self, *, has_gpu: bool) -> None:
        """Refuse CUDA graphs without a GPU, which may be known late.

        Raises:
            ConfigError: As said.
        """
        if self.speed.cuda_graphs and not has_gpu:
            remedy = "leave it out, or run where there is a GPU"
            raise ConfigError("speed.cuda_graphs", True, "CUDA graphs need a GPU, and this run has none", remedy)

    def check_workers(self, workers: int) -> None:
        """See that every step can be shared among this many workers; their number may be known late.

        Raises:
            ConfigError: It cannot.
        """
        batch, mining = self.training.global_batch_size, self.mining
        if batch < 2 * workers:
            reason, remedy = f"under 2 images for each of {workers} workers", f"use at least {2 * workers}"
            raise ConfigError("training.global_batch_size", batch, reason, f"{remedy}, or fewer workers")
        shared = self.mines_triplets and mining.scope == "global" and mining.pool == "separate"
        if shared and mining.pool_size % workers:
            below = mining.pool_size // workers * workers
            reason = f"not divisible by {workers} workers with mining.scope=global"
            remedy = f"use {below} or {below + workers}" if below else f"use {workers}"
            raise ConfigError("mining.pool_size", mining.pool_size, reason, remedy)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.scaling.num_workers, int):
            try:
                self.check_workers(self.scaling.num_workers)
            except ConfigError as error:
                raise wrong(str(error.subject), error.value, error.reason, error.remedy) from None
        if self.mines_triplets and self.loss.triplet_weight == 0:
            raise wrong(
                "loss.triplet_weight",
                0,
                f"method {self.method} trains a triplet term",
                "give a weight above 0, or method at",
            )
        if self.method == "alp" and self.loss.logit_pairing_weight == 0:
            raise wrong(
                "loss.logit_pairing_weight", 0, "method alp pairs logits", "give a weight above 0, or method at"
            )
        self._check_terms()
        if self.data.root is None and self.data.name != "digits":
            raise wrong("data.root", None, f"{self.data.name} is not embedded", "give a folder, or s3://bucket/prefix")
        return self

    def _check_terms(self) -> None:
        """What the method, the term on labels and the attack make of one another."""
        term, method = self.robust_term, self.method
        has_own = method in ("natural", "alp", "trades", "mart")
        if has_own and term != (method if method in ("trades", "mart") else "cross_entropy"):
            reason = f"method {method} has a term of its own"
            raise wrong("loss.robust_term", term, reason, f"leave it out, or take method {term} or tla")
        if self.loss.clean_weight and term != "cross_entropy":
            reason = f"the {term} term has its own share of clean images"
            raise wrong("loss.clean_weight", self.loss.clean_weight, reason, "leave it out, or set loss.robust_weight")
        if self.loss.robust_weight is not None and term == "cross_entropy":
            reason = f"method {method} has no divergence to weight"
            remedy = "leave it out, or set loss.robust_term to trades or mart"
            raise wrong("loss.robust_weight", self.loss.robust_weight, reason, remedy)
        if self.attack_objective == "kl" and not self.attack.random_start and self.attack.kind == "pgd":
            reason = "the divergence from an image to itself has no gradient"
            remedy = "set it to true, or attack.objective to cross_entropy"
            raise wrong("attack.random_start", "False", reason, remedy)
        if self.attack_objective == "kl" and self.attack.noise == 0 and self.attack.kind == "n_fgsm":
            reason = "the divergence from an image to itself has no gradient"
            raise wrong("attack.noise", 0, reason, "give noise, or set attack.objective to cross_entropy")
        reuses = self.mines_triplets and self.mining.pool == "separate" and self.mining.queries == "last_step"
        if reuses and self.attack.kind == "free":
            reason = "free training takes no attack steps before it mines"
            raise wrong("mining.queries", "last_step", reason, "use final, or another attack.kind")
        if self.loss.triplet_layer != "embedding" and not self.mines_triplets:
            reason = f"method {method} makes no triplets"
            raise wrong("loss.triplet_layer", self.loss.triplet_layer, reason, "leave it out, or take method tla")
        if self.attack.awp and method == "natural":
            raise wrong("attack.awp", "True", "method natural meets no adversary", "leave it out, or take method at")
