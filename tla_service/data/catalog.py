"""Data sets by name."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence

import torch

from tla_service.config import DataConfig
from tla_service.data.decoding import resized
from tla_service.data.image_folder import load_image_folder, load_tiny_imagenet
from tla_service.data.parquet import COLUMNS, load_parquet
from tla_service.data.sources import ArraySource, Dataset, ImageSource, Splits
from tla_service.data.splits import gate_images, split_validation, stratified_subset
from tla_service.data.torchvision_sets import load_torchvision_set
from tla_service.data.trees import SPLITS, listed, notice, refuse_settings
from tla_service.errors import ConfigError, UnavailableError

_UNBALANCED = 4


def load_digits(config: DataConfig) -> Splits:
    """Load scikit-learn's handwritten digits: 1797 grey images of 8x8, values 0..16 stretched to 0..255.

    The set has no test split. A fixed, stratified quarter (450 images) is the test set, the same for every seed.
    """
    from sklearn import datasets, model_selection

    bunch = datasets.load_digits()
    labels = torch.from_numpy(bunch.target)
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    rows = range(len(labels))
    parts = model_selection.train_test_split(rows, test_size=0.25, random_state=0, stratify=labels.numpy())
    whole = ArraySource(pixels if config.image_size is None else resized(pixels, config.image_size), labels)
    train, test = (whole.subset(torch.tensor(sorted(part))) for part in parts)
    return Splits(tuple(map(str, range(10))), train, test)


_LOADERS = {
    "digits": load_digits,
    **dict.fromkeys(("mnist", "fashion_mnist", "cifar10", "cifar100"), load_torchvision_set),
    "tiny_imagenet": load_tiny_imagenet,
    "image_folder": load_image_folder,
    "parquet": load_parquet,
}


def load_dataset(config: DataConfig) -> Dataset:
    """Load a data set by name.

    Archives and s3:// roots are copied, and images decoded, into ``data.cache_dir`` once per node; processes that
    start together share the work. A root is never written to, except by ``data.download``. ConfigError if settings do
    not fit the set or classes have no training images, UnavailableError if it is missing or damaged.
    """
    if config.name in ("digits", "tiny_imagenet", "image_folder"):
        refuse_settings(config, COLUMNS, f"data set {config.name} has no columns", "parquet")
    if config.name in ("digits", "tiny_imagenet"):
        refuse_settings(config, SPLITS, f"the splits of {config.name} are fixed", "image_folder or parquet")
    if config.download and _LOADERS[config.name] is not load_torchvision_set:
        raise ConfigError("data.download", True, f"data set {config.name} cannot be downloaded", "leave it out")
    if config.root and config.name == "digits":
        notice("data.root=%s: not read, digits are part of scikit-learn; set data.name for your data", config.root)
    splits = _LOADERS[config.name](config)
    whole, held_out = splits.train, splits.test
    if held_out is None:
        assert config.test_fraction is not None
        parts = split_validation(whole.labels, config.test_fraction, 0, splits.class_names, "data.test_fraction")
        whole, held_out = (whole.subset(part) for part in parts)
    _check(config, whole, held_out, splits)
    train, test = _limited(whole, config.train_limit), _limited(held_out, config.test_limit)
    gate = gate_images(held_out.labels)[stratified_subset(held_out.labels, len(test))]
    if config.train_limit is not None and len(torch.unique(train.labels)) < len(splits.class_names):
        # The smallest class's first image comes after about N / 2n others; see `stratified_subset`.
        classes, fewest = len(splits.class_names), int(whole.labels.bincount().min())
        enough = min(len(whole), max(4 * classes, len(whole) // (2 * fewest) + classes))
        reason = f"leaves some of the {classes} classes without images"
        raise ConfigError("data.train_limit", config.train_limit, reason, f"use at least {enough}")
    facts = [train.digest(), test.digest(), splits.class_names, train.image_shape]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Dataset(config.name, train, test, gate, splits.class_names, fingerprint, splits.validation)


def _limited(source: ImageSource, limit: int | None) -> ImageSource:
    return source if limit is None or limit >= len(source) else source.subset(stratified_subset(source.labels, limit))


def _check(config: DataConfig, train: ImageSource, test: ImageSource, splits: Splits) -> None:
    names, validation = splits.class_names, splits.validation
    if len(names) < 2:
        raise ConfigError("data.name", config.name, "has one class only", "give a set of at least two classes")
    if not len(train) or not len(test):
        part = "test" if len(train) else "training"
        raise UnavailableError("data.root", config.root, f"has no {part} images", "point it at a whole data set")
    # Before anything as large as the largest label is allocated.
    for source in (train, test) if validation is None else (train, test, validation):
        if int(source.labels.min()) < 0 or int(source.labels.max()) >= len(names):
            reason = f"has labels beyond its {len(names)} classes"
            raise UnavailableError("data.root", config.root, reason, "correct the labels")
    counts = train.labels.bincount(minlength=len(names)).tolist()
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        reason = f"{len(empty)} classes have no training images, {empty[0]!r} first"
        raise ConfigError("data.name", config.name, reason, "add images, or remove the class")
    for part, images in (("test", test), ("validation", validation)):
        present = set() if images is None else set(images.labels.tolist())
        missing = [name for number, name in enumerate(names) if number not in present]
        if missing and images is not None:
            notice("data.root=%s: %d classes have no %s images: %s", config.root, len(missing), part, listed(missing))
    _notice_imbalance(config, counts, names)
    _notice_twins(config, names)
    if train.image_shape != test.image_shape:
        reason = f"training images are {train.image_shape}, test images {test.image_shape}"
        raise ConfigError("data.image_size", config.image_size, reason, "give a side to resize all to")


def _notice_imbalance(config: DataConfig, counts: Sequence[int], names: Sequence[str]) -> None:
    """Warn of classes with far more or fewer training images than others, unless something is done about it."""
    (fewest, smallest), (most, largest) = min(zip(counts, names, strict=True)), max(zip(counts, names, strict=True))
    if config.balance == "none" and most >= _UNBALANCED * fewest:
        text = "data.root=%s: the largest class, %r with %d images, is %.0f times the smallest, %r with %d; %s"
        notice(text, config.root, largest, most, most / fewest, smallest, fewest, "consider data.balance")


def _notice_twins(config: DataConfig, names: tuple[str, ...]) -> None:
    """Warn of classes that look like two spellings of one; single letters may be a set of their own."""
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if len(name) > 1:
            spellings[name.strip().casefold()].append(name)
    for twins in spellings.values():
        if len(twins) > 1:
            shown = " and ".join(map(repr, twins))
            notice("data.root=%s: classes %s differ only in case or spaces", config.root, shown)
