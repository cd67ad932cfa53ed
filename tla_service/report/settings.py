"""What the evaluation job can be told: the model, the threat model, how many images each measure takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tla_service.config import DataConfig, ScalingConfig, TrackingConfig
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.fields import AttackName, Pixels, Section, setting, wrong
from tla_service.config.loading import JobSettings
from tla_service.config.radii import Norm, length_trouble
from tla_service.config.sections import DatasetName
from tla_service.errors import ConfigError


class EvaluatedData(Section):
    """The data set; what is not given is taken from the run that trained the model."""

    name: DatasetName | None = setting(None, "data set; none: as in training")
    root: str | None = setting(None, "folder, zip file or s3://bucket/prefix with the data set; none: as in training")
    cache_dir: str | None = setting(None, "cache of s3:// roots and unpacked archives, per node; none: as in training")
    train: str | None = setting(None, "name of the training split; none: as in training", min_length=1)
    validation: str | None = setting(None, "name of the validation split; none: as in training")
    test: str | None = setting(None, "name of the test split; none: as in training", min_length=1)
    test_limit: int | None = setting(None, "use only this many test images (stratified)", unit="images", ge=1)
    image_size: int | None = setting(None, "resize to this side; none: as in training", unit="pixels", ge=4)
    label_column: str | None = setting(None, "label column of parquet files; none: as in training", min_length=1)
    image_column: str | None = setting(None, "image column of parquet files; none: as in training", min_length=1)


class ImageCounts(Section):
    """Images per measurement (stratified, always the same ones); 0 skips it."""

    attacks: int | None = setting(None, "test images for the table of attacks; none: all", unit="images", ge=1)
    autoattack: int = setting(1000, "test images for AutoAttack", unit="images", ge=0)
    adversarial: bool = setting(True, "write AutoAttack's images to adversarial.npz, for others to check")
    curves: int = setting(200, "test images for accuracy versus radius and steps", unit="images", ge=0)
    sparse: int = setting(100, "test images for attacks in the other norms", unit="images", ge=0)
    corruptions: int = setting(1000, "test images for the corruptions of CIFAR-10-C", unit="images", ge=0)
    audit: int = setting(256, "test images for the audit", unit="images", ge=0)
    unit_tests: int = setting(
        64, "test images of the audit that get a planted adversarial example", unit="images", ge=0
    )
    transfer: int = setting(500, "test images attacked through the model's relatives", unit="images", ge=0)
    representation: int = setting(
        10_000, "test images for detection, calibration, k-NN, shift ratios and t-SNE", unit="images", ge=0
    )
    adaptive: int = setting(
        1000, "test images for the attacks on the detector; needs images.representation", unit="images", ge=0
    )
    certified: int = setting(200, "test images for certificates by randomised smoothing", unit="images", ge=0)
    bank: int = setting(10_000, "training images for the class Gaussians and nearest neighbours", ge=1)


class DetectionSettings(Section):
    """Detection of misclassified images: choices that the paper leaves open."""

    epsilon: Pixels | None = setting(
        None,
        "radius of the adversarial images; none: the paper's (MNIST 0.3, CIFAR-10 and Tiny ImageNet 25/255), else 1.5 "
        "times the threat model's",
        unit="pixels in [0, 1], or L2 length",
        gt=0,
    )
    num_steps: int | None = setting(None, "attack steps; none: the paper's (100, 20, 30), else 50", ge=1, le=10_000)
    step_size: Pixels | None = setting(None, "step size; none: 2.5 radii over all steps", gt=0)
    covariance: Literal["full", "tied", "diagonal"] = setting("full", "covariance of the class Gaussians")
    shrinkage: Literal["ledoit_wolf", "none"] = setting("ledoit_wolf", "shrinkage of the covariance")
    normalize: bool = setting(True, "scale embeddings to unit length")
    rule: Literal["likeliest", "predicted"] = setting("likeliest", "class whose log density is the score")


class CertificateSettings(Section):
    """Randomised smoothing: what the certificates are of, and how certain they are."""

    sigma: Pixels | None = setting(
        None,
        "standard deviation of the noise on each pixel value; none: the threat model's radius in L-infinity, half of "
        "it in L2",
        unit="pixels in [0, 1]",
        gt=0,
    )
    samples: int = setting(1000, "noisy copies that bound an image's radius; more certify larger ones", ge=100)
    alpha: float = setting(0.001, "probability that a certificate is wrong, at most", ge=1e-9, le=0.1)


class NeighbourSettings(Section):
    """Classification and retrieval by nearest training images."""

    k: int = setting(50, "number of neighbours; the paper's K", ge=1)
    metric: Literal["angular", "cosine", "euclidean"] = setting("angular", "distance; angular is the learned metric")


class PictureSettings(Section):
    """Contents of the figures."""

    queries: int = setting(4, "queries of the retrieval panel", ge=1, le=12)
    tsne_class: int | None = setting(
        None, "class of the first t-SNE figure; none: deer for CIFAR-10 (Fig. 1), else the one that attacks break most"
    )
    tsne_pair: tuple[int, int] | None = setting(
        None,
        "true class and wrong prediction of the second; none: truck and bird for CIFAR-10 (Fig. 2), else the most "
        "frequent pair",
    )


class ReportSettings(JobSettings):
    """What an evaluation of checkpoint folders takes."""

    model: str = setting("", "model to evaluate: a checkpoint folder")
    compare: tuple[str, ...] = setting((), "other models to compare with: --compare A B C")
    surrogate: str | None = setting(
        None,
        "independently trained model for transfer attacks; none: the audit trains a small one, and the table has no "
        "transfer attacks",
    )
    output: Path | None = Field(
        None,
        description="output folder; default reports/<digest of the weights>, with norm and radius if they differ from "
        "training",
    )
    norm: Norm | None = setting(None, "norm of the threat model; none: as in training")
    epsilon: Pixels | None = setting(
        None,
        "radius of the threat model; none: as in training, or the data set's documented radius in another norm",
        unit="pixels in [0, 1], or L2 length",
        gt=0,
    )
    attacks: dict[AttackName, EvaluationAttack] = setting(
        {}, "attacks by name; none: the paper's columns for the data set. Without step_size, a tenth of the radius"
    )
    seed: int = setting(0, "seed of all random draws", ge=0, lt=2**31)
    batch_size: int = setting(200, "images per forward pass and shard; a killed worker repeats one shard", ge=2)
    page: bool = setting(True, "draw figures and write report.html; without it report.json and outcomes only")
    data: EvaluatedData = EvaluatedData()
    images: ImageCounts = ImageCounts()
    detection: DetectionSettings = DetectionSettings()
    certificate: CertificateSettings = CertificateSettings()
    neighbours: NeighbourSettings = NeighbourSettings()
    pictures: PictureSettings = PictureSettings()

    def data_config(self, trained: DataConfig | None) -> DataConfig:
        """The data set of the training run, None where it is not known, with what is given here in its place."""
        given = self.data.model_dump(exclude_none=True)
        if trained is None and "name" not in given:
            remedy = "give data.name, and data.root unless it is digits"
            raise ConfigError("data.name", None, "the model does not say what it was trained on", remedy)
        if trained is None or given.get("name", trained.name) != trained.name:
            return DataConfig.model_validate(given)
        # A test split that is named here replaces one that was held out.
        replaced = {"test_limit", "test_fraction"} if "test" in given else {"test_limit"}
        return DataConfig.model_validate(trained.model_dump(exclude=replaced) | given)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model:
            raise wrong("model", "", "no model is named", "give --model with the path of a checkpoint folder")
        # The last four are columns of the per-image results too: attacks crafted on relatives.
        for name in ("clean", "autoattack", "worst", "pretrained", "last", "average", "natural"):
            if name in self.attacks:
                raise wrong(f"attacks.{name}", name, "this name is reserved", "rename the attack")
        # As far as they are given here; `check_plan` checks what they become.
        chosen = self.detection
        lengths: list[tuple[str, Norm | None, float | None, float | None, int | None]] = [
            ("", self.norm, self.epsilon, None, None),
            ("detection", self.norm, chosen.epsilon, chosen.step_size, chosen.num_steps),
        ]
        for name, attack in self.attacks.items():
            step = None if attack.kind == "fgsm" else attack.step_size
            lengths.append((f"attacks.{name}", attack.norm or self.norm, attack.epsilon, step, attack.num_steps))
        for where, norm, epsilon, step_size, steps in lengths:
            found = length_trouble(where, norm or "linf", epsilon, step_size, steps) if epsilon is not None else None
            if found is not None:
                other = ", or give --norm l2" if norm is None and str(found.subject).endswith("epsilon") else ""
                raise wrong(str(found.subject), found.value, found.reason, found.remedy + other)
        return self


class EvaluateSettings(ReportSettings):
    """What an evaluation on Ray takes, of checkpoints and of models in MLflow."""

    model: str = setting("", "model to evaluate: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/..., or a folder")
    log: bool = setting(True, "log report and figures to the model's MLflow run, and tag its version")
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()


def spread_lists(arguments: Sequence[str], names: Sequence[str] = ("compare",)) -> list[str]:
    """Turn ``--compare A B C`` into ``--compare A --compare B --compare C``, which is what the parser takes."""
    spread: list[str] = []
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument if argument.removeprefix("--") in names else ""
        elif flag and spread[-1] != flag:
            spread.append(flag)
        spread.append(argument)
    return spread
