"""What an evaluation begins with: models and data, loaded and found to fit each other."""

from dataclasses import dataclass

import torch

from tla_service.data import Dataset, load_dataset
from tla_service.errors import ConfigError
from tla_service.evaluation.suite import as_pixels, clean_logits, logits_of
from tla_service.registry.subject import Subject, load_subject
from tla_service.report.settings import EvaluateSettings

_PROBE_IMAGES = 2


@dataclass(frozen=True)
class Models:
    """Everything that is loaded before Ray starts.

    Attributes:
        subject: The model under evaluation.
        others: Models to set beside it.
        surrogate: The one that transfer attacks are crafted on.
        dataset: What all are evaluated on.
    """

    subject: Subject
    others: tuple[Subject, ...]
    surrogate: Subject | None
    dataset: Dataset

    @property
    def all(self) -> tuple[Subject, ...]:
        """Models that are measured."""
        return (self.subject, *self.others)


def load_models(settings: EvaluateSettings, uri: str) -> Models:
    """Load models and data, and check that they fit each other.

    Args:
        settings: Names them.
        uri: Tracking store.

    Raises:
        UserError: One is missing, or does not fit.
    """
    subject = load_subject(settings.model, "model", uri)
    others = tuple(load_subject(other, "compare", uri) for other in settings.compare)
    surrogate = load_subject(settings.surrogate, "surrogate", uri) if settings.surrogate else None
    keys = [each.key for each in (subject, *others)]
    if len(set(keys)) < len(keys):
        twice = next(settings.compare[at] for at in range(len(others)) if keys[at + 1] in keys[: at + 1])
        raise ConfigError("compare", twice, "these weights are named twice", "name each model once")
    if surrogate is not None and surrogate.key in keys:
        itself = "is the model under evaluation itself"
        other = "is compared too: for that model a transferred attack would be a white-box one"
        remedy = "name another, such as the same configuration trained with another --seed"
        raise ConfigError("surrogate", settings.surrogate, itself if surrogate.key == keys[0] else other, remedy)
    dataset = load_dataset(settings.data_config(subject.config.data if subject.config is not None else None))
    named = [("model", subject), *(("compare", other) for other in others)]
    for field, each in [*named, *([("surrogate", surrogate)] if surrogate is not None else [])]:
        _check_fit(field, each, dataset)
    return Models(subject, others, surrogate, dataset)


def _check_fit(field: str, subject: Subject, dataset: Dataset) -> None:
    """Image shape, classes and finite outputs, on two images."""
    images = dataset.test.fetch(torch.arange(min(_PROBE_IMAGES, len(dataset.test))))
    shape, takes = ("x".join(map(str, each)) for each in (dataset.image_shape, subject.image_shape))
    if shape != takes:
        remedy = "evaluate it on images like those it was trained on (data.name, data.root)"
        raise ConfigError(field, subject.facts.uri, f"takes {takes} images, {dataset.name} has {shape}", remedy)
    if len(subject.class_names) != len(dataset.class_names):
        reason = f"knows {len(subject.class_names)} classes, {dataset.name} has {len(dataset.class_names)}"
        raise ConfigError(field, subject.facts.uri, reason, "evaluate it on the classes it was trained on")
    # Classes may have been renamed, but not moved.
    for number, name in enumerate(subject.class_names):
        if name != dataset.class_names[number] and name in dataset.class_names:
            place = dataset.class_names.index(name)
            reason = f"its class {name!r} is number {number}, in {dataset.name} it is number {place}"
            raise ConfigError(field, subject.facts.uri, reason, "evaluate it on data with the classes in its order")
    try:
        clean_logits(
            logits_of(subject.network),
            as_pixels(images, torch.device("cpu")),
            torch.zeros(len(images), dtype=torch.int64),
        )
    except ConfigError as error:
        raise ConfigError(field, subject.facts.uri, error.reason, error.remedy) from error
