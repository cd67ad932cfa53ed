"""Extra images of a run: read from npz or Parquet files, and checked for leaks of validation and test images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tla_service.config import DataConfig
from tla_service.data.cache import cached_tensors, content_digest, files_key
from tla_service.data.catalog import load_dataset
from tla_service.data.duplicates import NEAR, near_duplicates
from tla_service.data.npz import FIELD, read_npz
from tla_service.data.parquet import COLUMNS, load_unsplit
from tla_service.data.parquet_labels import UNLABELED
from tla_service.data.roots import required_root
from tla_service.data.sources import ArraySource, Dataset, ImageSource
from tla_service.data.trees import listed, notice
from tla_service.errors import ConfigError, UserError


@dataclass(frozen=True)
class ExtraImages:
    """Images to train on, at ``rows`` (M,), int64, of ``source``; and what is recorded of them with the run."""

    source: ImageSource
    rows: torch.Tensor
    facts: dict[str, str]


def load_extra(
    config: DataConfig, dataset: Dataset, validation: tuple[ImageSource, torch.Tensor]
) -> ExtraImages | None:
    """The images of ``data.extra``, if any, for a data set and its validation images (rows of a source).

    ConfigError if they do not fit the data set, or are near-duplicates of validation images or of any test image, with
    or without ``data.test_limit``, and ``data.extra.duplicates`` is refuse; UnavailableError if they cannot be read.
    """
    if config.extra.path is None:
        return None
    source, name = _read(config, dataset)
    leaks = _leaks(config, source, name, dataset, validation)
    if leaks:
        text = f"{len(leaks)} of its {len(source)} images are near-duplicates of validation or test images"
        shown = listed([*leaks.values()])
        if config.extra.duplicates == "refuse":
            remedy = "leave them out, or set data.extra.duplicates=drop"
            raise ConfigError(FIELD, config.extra.path, f"{text}: {shown}", remedy)
        if len(leaks) == len(source):
            raise ConfigError(FIELD, config.extra.path, text, "give another set")
        notice("%s=%s: %s, and left out: %s", FIELD, config.extra.path, text, shown)
    rows = torch.tensor([row for row in range(len(source)) if row not in leaks])
    digest = hashlib.sha256(f"{source.digest()}{content_digest(rows)}".encode()).hexdigest()[:16]
    counts = {"extra_images": str(len(rows)), "extra_duplicates_left_out": str(len(leaks))}
    return ExtraImages(source, rows, {"extra_fingerprint": digest, **counts})


def _read(config: DataConfig, dataset: Dataset) -> tuple[ImageSource, Callable[[int], str]]:
    """The images, and where each is: its row, or its file and row."""
    given, names = config.extra.path, dataset.class_names
    try:
        path = required_root(config.model_copy(update={"root": given, "download": False}))
        if path.suffix != ".npz":
            source, name = load_unsplit(config, path, names, dataset.image_shape[0])
        else:

            def build() -> dict[str, torch.Tensor]:
                return dict(zip(("images", "labels"), read_npz(path, dataset.image_shape), strict=True))

            key = f"{files_key([path], dataset.image_shape)}-npz"
            arrays, digests = cached_tensors(config.cache_dir, key, build)
            source, name = ArraySource(**arrays, digest="".join(digests.values())), "row {}".format
    except UserError as error:
        if error.subject in COLUMNS:
            raise ConfigError(FIELD, given, error.reason, "rename the column") from error
        subject = FIELD if error.subject == "data.root" else error.subject
        raise type(error)(subject, error.value, error.reason, error.remedy) from error
    if source.image_shape != dataset.image_shape:
        shapes = ["x".join(map(str, each)) for each in (source.image_shape, dataset.image_shape)]
        reason = f"its images are {shapes[0]} (C x H x W), those of the data set {shapes[1]}"
        raise ConfigError(FIELD, given, reason, "resize them, or set data.image_size")
    wrong = ((source.labels < 0) | (source.labels >= len(names))).nonzero()[:, 0].tolist()
    if wrong:
        label = int(source.labels[wrong[0]])
        reason = f"{name(wrong[0])} has label {label}, which is none of the data set's {len(names)} classes, from 0"
        raise ConfigError(FIELD, given, reason, UNLABELED[1] if label < 0 else "use the numbers of its classes")
    return source, name


def _leaks(
    config: DataConfig,
    source: ImageSource,
    name: Callable[[int], str],
    dataset: Dataset,
    validation: tuple[ImageSource, torch.Tensor],
) -> dict[int, str]:
    """Near-duplicates of validation and test images, described, by row; found once per node."""
    test = dataset.test
    if config.test_limit is not None:  # a report may measure them all
        test = load_dataset(config.model_copy(update={"test_limit": None})).test
    references = [validation, (test, torch.arange(len(test)))]
    facts = [source.digest(), NEAR, *((other.digest(), content_digest(rows)) for other, rows in references)]
    key = f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}-duplicates"
    found, _ = cached_tensors(config.cache_dir, key, lambda: near_duplicates(source, references)._asdict())
    held_out = "validation" if dataset.validation is not None else "held-out training"
    leaks, own = {}, validation[1].tolist()
    for row, place, distance in zip(
        *(found[part].tolist() for part in ("rows", "references", "distances")), strict=True
    ):
        image = f"{held_out} image {own[place]}" if place < len(own) else f"test image {place - len(own)}"
        leaks[row] = f"{name(row)} = {image} (distance {distance:.3f})"
    return leaks
