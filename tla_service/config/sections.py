"""Sections of a run: data, network, evaluation and detection."""

from typing import Any, Literal, Self

from pydantic import model_validator

from tla_service.config.adversary import EvaluationAttack
from tla_service.config.fields import AttackName, DataPath, Pixels, Section, setting, wrong

DatasetName = Literal[
    "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "image_folder", "parquet"
]


class ExtraConfig(Section):
    """Synthetic or other additional images with labels, in every training batch."""

    path: DataPath | None = setting(None, "npz file, Parquet file or folder of them, or s3://...; none: off")
    share: float | None = setting(None, "share of each batch that is extra images; published: 0.7", gt=0, lt=1)
    duplicates: Literal["refuse", "drop"] = setting("refuse", "near-duplicates of validation and test images")


class DataConfig(Section):
    """The data set, its splits and augmentation."""

    name: DatasetName = setting("digits", "data set; digits ships with the installation")
    root: DataPath | None = setting(None, "folder, zip file or s3://bucket/prefix with the data set")
    download: bool = setting(False, "download the data set into data.root if it is missing (torchvision data sets)")
    cache_dir: DataPath = setting(
        "~/.cache/tla-service", "cache of s3:// roots, unpacked archives and decoded images, per node"
    )
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
        "network: digits_cnn, small_cnn, cifar_cnn, cifar_cnn_bn, mnist_cnn, mnist_mlp, wrn_32_10, wrn_28_10, "
        "wrn_34_10, preact_resnet_18, tiny_resnet50_stride2, tiny_resnet50_stride1, tiny_resnet20_stride1, "
        "torchvision:NAME, timm:NAME, or package.module:factory",
    )
    code: str | None = setting(
        None,
        "folder with the modules of package.module:factory, which travels with the run; none: it is installed",
        min_length=1,
    )
    embedding: str | None = setting(
        None, "layer whose output is the embedding, such as layer4; none: the input of the last linear layer"
    )
    normalization: Literal["default", "none", "per_image", "cifar10", "imagenet"] = setting(
        "default", "input normalization inside the network; default: the network's own"
    )
    activation: Literal["default", "relu", "silu"] = setting(
        "default",
        "activation of wrn_*, preact_resnet_18, cifar_cnn*, small_cnn, digits_cnn; default: ReLU (wrn_32_10: leaky)",
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
        EvaluationAttack(),
        "attack on the validation split; selects the best weights (of natural training, clean accuracy does)",
    )
    validation_limit: int | None = setting(None, "attack only this many validation images", unit="images", ge=1)
    validation_margin: bool = setting(
        False,
        "attack validation images with PGD on the logit margin as well, and count what withstands both; cross-entropy "
        "alone overrates some settings",
    )
    every_epochs: int = setting(1, "validate every this many epochs, and after the last", unit="epochs", ge=1)
    test: dict[AttackName, EvaluationAttack] = setting(
        {"fgsm": EvaluationAttack(kind="fgsm"), "pgd20": EvaluationAttack()}, "attacks on the test set, by name"
    )
    batch_size: int = setting(500, "images per forward pass, per worker", unit="images", ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.test:
            reason = "without an attack, accuracy under attack would be that on clean images"
            raise wrong("evaluation.test", {}, reason, "give one, or leave it out")
        if "worst" in self.test:
            raise wrong("evaluation.test.worst", "worst", "this name is reserved", "rename the attack")
        return self

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
