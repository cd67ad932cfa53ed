"""The models and data of an evaluation, loaded and checked against each other."""

from dataclasses import dataclass

import torch

from tla_service.data import Dataset, load_dataset
from tla_service.data.augmentation import to_unit
from tla_service.errors import ConfigError
from tla_service.evaluation.shards import logits_of
from tla_service.evaluation.suite import clean_logits
from tla_service.report.relatives import Kin, find_relatives
from tla_service.report.settings import ReportSettings
from tla_service.report.subjects import LoadSubject, Subject

_PROBE_IMAGES = 2


@dataclass(frozen=True)
class Models:
    """Models and data of an evaluation: the model evaluated, those compared with it, the surrogate."""

    subject: Subject
    others: tuple[Subject, ...]
    surrogate: Subject | None
    dataset: Dataset
    relatives: tuple[Kin, ...] = ()

    @property
    def all(self) -> tuple[Subject, ...]:
        """Models that are measured."""
        return (self.subject, *self.others)


def load_models(settings: ReportSettings, load_subject: LoadSubject) -> Models:
    """Load models and data; UserError if one is missing, or they do not fit each other."""
    subject = load_subject(settings.model, "model")
    others = tuple(load_subject(other, "compare") for other in settings.compare)
    surrogate = load_subject(settings.surrogate, "surrogate") if settings.surrogate else None
    keys = [each.key for each in (subject, *others)]
    for place, address in enumerate(settings.compare, start=1):
        if keys[place] in keys[:place]:
            raise ConfigError("compare", address, "these weights are named twice", "name each model once")
    if surrogate is not None and surrogate.key in keys:
        itself = "is the model under evaluation itself"
        other = "is compared too: for that model a transferred attack would be a white-box one"
        remedy = "name another, such as the same configuration trained with another --seed"
        raise ConfigError("surrogate", settings.surrogate, itself if surrogate.key == keys[0] else other, remedy)
    dataset = load_dataset(settings.data_config(subject.config.data if subject.config is not None else None))
    named = [("model", subject), *(("compare", other) for other in others)]
    for field, each in [*named, *([("surrogate", surrogate)] if surrogate is not None else [])]:
        _check_fit(field, each, dataset)
    relatives = find_relatives(subject, load_subject) if settings.images.transfer else ()
    return Models(subject, others, surrogate, dataset, relatives)


def _check_fit(field: str, subject: Subject, dataset: Dataset) -> None:
    """Image shape, classes and finite outputs, on two images."""
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
    images = dataset.test.fetch(torch.arange(min(_PROBE_IMAGES, len(dataset.test))))
    try:
        clean_logits(logits_of(subject.network), to_unit(images), torch.zeros(len(images), dtype=torch.int64))
    except ConfigError as error:
        raise ConfigError(field, subject.facts.uri, error.reason, error.remedy) from error
