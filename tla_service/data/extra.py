"""Extra images of a run: read from npz or Parquet files, and checked for leaks of validation and test images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tla_service.config import DataConfig
from tla_service.data.cache import cached_tensors, content_digest, files_key
from tla_service.data.catalog import load_dataset
from tla_service.data.duplicates import NEAR, near_duplicates
from tla_service.data.npz import read_npz
from tla_service.data.parquet import COLUMNS, load_unsplit
from tla_service.data.roots import required_root
from tla_service.data.sources import ArraySource, Dataset, ImageSource, SourceRows
from tla_service.data.trees import listed, notice
from tla_service.errors import ConfigError, UserError

FIELD = "data.extra.path"


@dataclass(frozen=True)
class ExtraImages:
    """Images to train on, at ``rows`` (M,), int64, of ``source``; and what is recorded of them with the run."""

    source: ImageSource
    rows: torch.Tensor
    facts: dict[str, str]


def load_extra(config: DataConfig, dataset: Dataset, validation: SourceRows) -> ExtraImages | None:
    """The images of ``data.extra``, if any, for a data set and its validation images.

    ConfigError if they do not fit the data set, or are near-duplicates of validation images or of any test image, with
    or without ``data.test_limit``, and ``data.extra.duplicates`` is refuse; UnavailableError if they cannot be read.
    """
    if config.extra.path is None:
        return None
    source, name = _read(config, dataset)
    leaks = _leaks(config, source, dataset, validation)
    if leaks:
        shown = listed([f"{name(row)} = {image}" for row, image in leaks.items()])
        text = f"{len(leaks)} of its {len(source)} images are near-duplicates of validation or test images: {shown}"
        if config.extra.duplicates == "refuse" or len(leaks) == len(source):
            drop = ", or set data.extra.duplicates=drop" if len(leaks) < len(source) else ""
            raise ConfigError(FIELD, config.extra.path, text, f"leave them out{drop}")
        notice("%s=%s: left out, since %s", FIELD, config.extra.path, text)
    kept = torch.ones(len(source), dtype=torch.bool)
    kept[[*leaks]] = False
    rows = kept.nonzero()[:, 0]
    digest = hashlib.sha256(f"{source.digest()}{content_digest(rows)}".encode()).hexdigest()[:16]
    counts = {"extra_images": str(len(rows)), "extra_duplicates_left_out": str(len(leaks))}
    return ExtraImages(source, rows, {"extra_fingerprint": digest, **counts})


def _read(config: DataConfig, dataset: Dataset) -> tuple[ImageSource, Callable[[int], str]]:
    """The images, and where each is: its row, or its file and row."""
    given, shape, classes = config.extra.path, dataset.image_shape, len(dataset.class_names)
    try:
        path = required_root(config.model_copy(update={"root": given, "download": False}))
        if path.suffix.lower() != ".npz":
            source, name = load_unsplit(config, path, dataset.class_names, colour=shape[0] == 3)
        else:
            key = f"{files_key([path], shape)}-npz"
            arrays, digests = cached_tensors(config.cache_dir, key, lambda: read_npz(path, shape))
            source = ArraySource(arrays["images"], arrays["labels"], digests["images"] + digests["labels"])
            name = "row {}".format
    except UserError as error:
        value, remedy = error.value, error.remedy
        if error.subject.removeprefix("data.") in COLUMNS:
            value, remedy = given, "rename a column, or label the images with a model (docs/data.md, Extra images)"
        elif error.subject != "data.root":
            raise
        raise type(error)(FIELD, value, error.reason, remedy) from error
    wrong = ((source.labels < 0) | (source.labels >= classes)).nonzero()[:, 0].tolist()
    if source.image_shape != shape:
        reason = f"its images are {source.image_shape}, those of the data set {shape} (channels, height, width)"
        raise ConfigError(FIELD, given, reason, "resize them, or set data.image_size")
    if wrong:
        reason = f"{name(wrong[0])} has label {int(source.labels[wrong[0]])}, not one of {classes} classes from 0"
        remedy = "correct it, or label the images with a model (docs/data.md, Extra images)"
        raise ConfigError(FIELD, given, reason, remedy)
    return source, name


def _leaks(config: DataConfig, source: ImageSource, dataset: Dataset, validation: SourceRows) -> dict[int, str]:
    """Which image each near-duplicate resembles, by row; computed once per node."""
    test = dataset.test
    if config.test_limit is not None:  # a report may measure them all
        test = load_dataset(config.model_copy(update={"test_limit": None})).test
    references = [validation, (test, torch.arange(len(test)))]
    facts = [source.digest(), NEAR, *((other.digest(), content_digest(rows)) for other, rows in references)]
    key = f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}-duplicates1"
    found, _ = cached_tensors(config.cache_dir, key, lambda: near_duplicates(source, references))
    kind = "validation" if dataset.validation is not None else "held-out training"
    names = [f"{kind} image {row}" for row in validation[1].tolist()] + [f"test image {n}" for n in range(len(test))]
    triples = zip(*(found[part].tolist() for part in ("rows", "references", "distances")), strict=True)
    return {row: f"{names[place]} (distance {distance:.3f})" for row, place, distance in triples}
