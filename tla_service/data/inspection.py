"""What the service sees of a data set: counts, sizes, damaged images, duplicates; and a sheet of images."""

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any, NamedTuple

import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont

from tla_service.config import DataConfig
from tla_service.data.catalog import load_dataset
from tla_service.data.decoding import usable_cores
from tla_service.data.extra import load_extra
from tla_service.data.sources import ImageSource
from tla_service.data.splits import split_training
from tla_service.data.trees import LOG, listed
from tla_service.errors import UserError

DEFAULT_SIDE = 64  # for image folders without data.image_size
_ROWS, _COLUMNS, _GAP, _LETTERS, _MOST_SIDE = 40, 8, 4, 24, 128  # of the contact sheet


class Seen(NamedTuple):
    """One image: where it is, size (width, height) and mode as stored, EXIF orientation, digest of its pixels."""

    name: str
    size: tuple[int, int]
    mode: str
    orientation: int
    digest: bytes


class Inspection(NamedTuple):
    """What was found: figures that are plain JSON, the contact sheet, and errors of images that cannot be used."""

    facts: dict[str, Any]
    sheet: Image.Image
    errors: list[UserError]

    def lines(self) -> Iterator[str]:
        """The figures for people."""
        facts, splits = self.facts, self.facts["splits"]
        yield f"data set      {facts['name']}, {facts['root'] or 'ships with the installation'}"
        yield f"network sees  {'x'.join(map(str, facts['image_shape']))} (channels x height x width)"
        yield f"splits        {', '.join(f'{name} {count}' for name, count in splits.items())}"
        yield f"validation    {facts['validation']}"
        *sizes, (_, differing) = facts["stored_sizes"].items()
        yield f"sizes         {', '.join(f'{name} {size}' for name, size in sizes)} ({differing} differ)"
        yield f"color modes   {', '.join(f'{mode} {count}' for mode, count in facts['color_modes'].items())}"
        yield ""
        width = max(map(len, ["class", *facts["classes"]]))
        for name, counts in {"class": {split: split for split in splits}, **facts["classes"]}.items():
            yield f"{name:<{width}}" + "".join(f"{counts[split]:>12}" for split in splits)
        yield ""
        yield from (f"warning: {warning}" for warning in facts["warnings"])


def inspect_dataset(config: DataConfig, seed: int = 0) -> Inspection:
    """Read every image of a data set, as training with this seed would; errors as `load_dataset`, before any is read.

    Images that cannot be used are collected. An image folder needs no ``data.image_size`` here.
    """
    unsized = config.name == "image_folder" and config.image_size is None
    side = DEFAULT_SIDE if unsized else config.image_size
    warnings: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        warnings.append(record.getMessage())
        return False

    dropping = config.extra.model_copy(update={"duplicates": "drop"})
    config = config.model_copy(update={"residency": "stream", "image_size": side, "extra": dropping})
    LOG.addFilter(keep)
    try:
        dataset = load_dataset(config)
        rows, validation = split_training(dataset, config.validation_fraction, seed)
        extra = load_extra(config, dataset, validation)
    finally:
        LOG.removeFilter(keep)
    test = (dataset.test, torch.arange(len(dataset.test)))
    parts = {"train": (dataset.train, rows), "validation": validation, "test": test}
    looked = {name: _look(*part) for name, part in parts.items()}
    seen = {name: [each for each in found if isinstance(each, Seen)] for name, found in looked.items()}
    errors = [each for found in looked.values() for each in found if isinstance(each, UserError)]
    everything = [each for found in seen.values() for each in found]
    labels = {name: source.labels[own].tolist() for name, (source, own) in parts.items()}
    counts = {name: Counter(own) for name, own in labels.items()}
    class_names = [_printable(name) for name in dataset.class_names]
    class_names = [
        name if class_names.count(name) == 1 else f"{name} (class {number})" for number, name in enumerate(class_names)
    ]
    held_out = f"held out of the training images (data.validation_fraction={config.validation_fraction:g})"
    if unsized:
        warnings.append(f"data.image_size is not set, which training requires; shown at {side}")
    turned = [each.name for each in everything if each.orientation != 1]
    if turned:
        text = f"{len(turned)} images have an EXIF orientation, which is not applied"
        remedy = "rotate the files (mogrify -auto-orient) if they look turned on the contact sheet"
        warnings.append(f"{text}; {remedy}: {listed(turned)}")
    duplicates = {f"{one} and {two}": _shared(seen[one], seen[two]) for one, two in combinations(parts, 2)}
    for pair, names in duplicates.items():
        if names:
            warnings.append(f"{len(names)} images are in both {pair}, which inflates accuracy: {listed(names)}")
    if errors:
        warnings.append(f"{len(errors)} images cannot be used: {listed([*map(str, errors)])}")
    facts: dict[str, Any] = {
        "name": config.name,
        "root": config.root,
        "image_shape": list(dataset.image_shape),
        "fingerprint": dataset.fingerprint,
        "splits": {name: len(own) for name, own in labels.items()},
        "validation": held_out if dataset.validation is None else "a split of its own",
        "classes": {
            label: {name: found[number] for name, found in counts.items()} for number, label in enumerate(class_names)
        },
        "stored_sizes": _sizes([each.size for each in everything]),
        "color_modes": dict(Counter(each.mode for each in everything).most_common()),
        "duplicates": {pair: len(names) for pair, names in duplicates.items()},
        "unusable": len(errors),
        "extra": None if extra is None else extra.facts,
        "warnings": [*map(_printable, warnings)],
    }
    usable = torch.tensor([isinstance(each, Seen) for each in looked["train"]])
    return Inspection(facts, _contact_sheet(dataset.train, rows[usable], facts["classes"]), errors)


def _printable(text: str) -> str:
    """Text in one line, without the surrogates that stand for bytes of file names that are no UTF-8."""
    return " ".join(text.encode("utf-8", "replace").decode().splitlines())


def _look(source: ImageSource, rows: torch.Tensor) -> list[Seen | UserError]:
    def one(row: int) -> Seen | UserError:
        try:
            name, image, pixels = source.look(row)
        except UserError as error:
            return error
        orientation = 1  # upright
        with contextlib.suppress(Exception):  # damaged EXIF data make Pillow raise errors of many kinds
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return Seen(name, image.size, image.mode, orientation, hashlib.sha256(pixels.tobytes()).digest())

    with ThreadPoolExecutor(min(16, usable_cores())) as pool:
        return list(pool.map(one, rows.tolist()))


def _shared(first: Iterable[Seen], second: Iterable[Seen]) -> list[str]:
    """Images of the second split whose pixels, as the network sees them, are in the first one, too."""
    names = {each.digest: each.name for each in first}
    return [f"{each.name} = {names[each.digest]}" for each in second if each.digest in names]


def _sizes(sizes: list[tuple[int, int]]) -> dict[str, str | int]:
    """Sizes (width x height) by area, and how many differ from the most frequent one."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size)) or [(0, 0)]
    (frequent, count), *_ = Counter(ordered).most_common(1)
    found = {"smallest": ordered[0], "median": ordered[len(ordered) // 2], "largest": ordered[-1]}
    shown = {name: f"{width}x{height}" for name, (width, height) in {**found, "most frequent": frequent}.items()}
    return {**shown, "differing": len(ordered) - count}


def _contact_sheet(source: ImageSource, rows: torch.Tensor, classes: Mapping[str, Mapping[str, int]]) -> Image.Image:
    """A few training images of each class, a class per row, as the network sees them.

    Small images are enlarged without smoothing, large ones reduced to a side of 128.
    """
    import matplotlib

    _, height, width = source.image_shape
    side = max(height, width)
    zoom = max(1, round(72 / side)) if side <= _MOST_SIDE else _MOST_SIDE / side
    width, height = max(1, round(zoom * width)), max(1, round(zoom * height))
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 14)
    shown = [f"{name:.{_LETTERS}} ({counts['train']})" for name, counts in [*classes.items()][:_ROWS]]
    left = round(max(font.getlength(text) for text in shown)) + 3 * _GAP
    step_y, step_x = max(height, 20) + _GAP, width + _GAP
    sheet = Image.new("RGB", (left + _COLUMNS * step_x, len(shown) * step_y + 24), "white")
    draw = ImageDraw.Draw(sheet)
    labels = source.labels[rows]
    for number, text in enumerate(shown):
        draw.text((_GAP, number * step_y + step_y // 2), text, "black", font=font, anchor="lm")
        for column, row in enumerate(rows[labels == number][:_COLUMNS].tolist()):
            _, _, pixels = source.look(row)
            tile = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())
            tile = tile.resize((width, height), Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX)
            sheet.paste(tile, (left + column * step_x, number * step_y))
    more = f", {len(classes) - len(shown)} more classes are not shown" if len(classes) > len(shown) else ""
    draw.text((_GAP, len(shown) * step_y + 2), f"class (training images){more}", "grey", font=font)
    return sheet
