"""Training and validation split, gate images, stratified subsets."""

import math
from collections.abc import Sequence

import torch

from tla_service.data.sources import Dataset, SourceRows
from tla_service.data.trees import listed
from tla_service.errors import ConfigError

_LIMIT_SEED = 0
_GATE_EVERY = 4  # one in four test images is reserved for the promotion gate


def split_validation(
    labels: torch.Tensor,
    fraction: float,
    seed: int,
    class_names: Sequence[str] = (),
    field: str = "data.validation_fraction",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold out a stratified share, in (0, 1), rounded up to whole images, of images of classes ``labels`` (N,), int64.

    Returns the indices of the training and of the validation images, int64, each sorted; disjoint, together all of
    [0, N). ConfigError, which names the setting ``field``, if some class is too small, or the share too small to hold
    one image of each class.
    """
    from sklearn.model_selection import train_test_split

    value, held_for = f"{fraction:g}", field.removeprefix("data.").removesuffix("_fraction")
    counts = labels.bincount()
    rare = (counts == 1).nonzero().flatten().tolist()
    classes, total = int((counts > 0).sum()), len(labels)
    if classes == 0:
        raise ConfigError(field, value, "there are no training images", "add some")
    if rare:
        names = listed([repr(class_names[number]) if class_names else str(number) for number in rare])
        subject = f"class {names} has" if len(rare) == 1 else f"each of the classes {names} has"
        reason = f"{subject} a single training image, too few to split off {held_for} images"
        raise ConfigError(field, value, reason, "add images, remove the class, or raise data.train_limit if it is set")
    held_out = -int(-total * fraction // 1)
    if held_out < classes or total - held_out < classes:
        reason = f"{held_out} of {total} images for {held_for}, with {classes} classes to cover in both parts"
        # Rounded up, or the share would be too small again.
        least = min(0.5, math.ceil(1000 * classes / total) / 1000)
        raise ConfigError(field, value, reason, f"use at least {least:g}")
    train, validation = train_test_split(range(total), test_size=held_out, random_state=seed, stratify=labels.numpy())
    return torch.tensor(sorted(train)), torch.tensor(sorted(validation))


def split_training(dataset: Dataset, fraction: float, seed: int) -> tuple[torch.Tensor, SourceRows]:
    """Rows (N,), int64, of ``dataset.train`` to train on, and the validation images.

    All of the data set's validation split, if it has one; else a share of the training images (`split_validation`).
    """
    if dataset.validation is not None:
        return torch.arange(len(dataset.train)), (dataset.validation, torch.arange(len(dataset.validation)))
    train, validation = split_validation(dataset.train.labels, fraction, seed, dataset.class_names)
    return train, (dataset.train, validation)


def stratified_subset(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Select images (min(count, N),), sorted, so that classes keep their shares; a larger count adds to a smaller's.

    ``labels`` are the classes (N,), int64.
    """
    total = len(labels)
    if count >= total:
        return torch.arange(total)
    shuffled, by_class, place = _shuffled_by_class(labels)
    # The k-th of a class's n images is at (k + 1/2) / n: cutting that line anywhere takes the same share of each.
    position = (place + 0.5) / labels.bincount()[labels[by_class]]
    # Ties between classes are broken by the shuffle; otherwise the lowest classes would win all of them.
    order = shuffled.argsort()[by_class].argsort()
    return by_class[order[position[order].argsort(stable=True)]][:count].sort().values


def gate_images(labels: torch.Tensor) -> torch.Tensor:
    """Which test images (N,), bool, are reserved for the promotion gate: one in four per class, by the labels alone.

    Every fourth image of a class, in the order of :func:`stratified_subset`: about a quarter of each of its subsets
    are gate images, too, and the first image of a class never is. Takes the classes of the whole test set (N,), int64.
    """
    _, by_class, place = _shuffled_by_class(labels)
    gate = torch.zeros(len(labels), dtype=torch.bool)
    # Classes begin at different places; otherwise rounding would favor one side in all of them.
    gate[by_class] = place % _GATE_EVERY == 1 + labels[by_class] % (_GATE_EVERY - 1)
    return gate


def _shuffled_by_class(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fixed shuffle of N images; the same sorted by class; and the number of each of these within its class."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_LIMIT_SEED))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return shuffled, by_class, place
