"""Folders of images, also in a zip file: train/<class>/... and test/<class>/..., or the layout of Tiny ImageNet."""

import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import NamedTuple

from tla_service.config import DataConfig
from tla_service.data.decoding import is_image
from tla_service.data.roots import required_root
from tla_service.data.sources import Splits, tree_splits
from tla_service.data.trees import (
    HOLD_OUT,
    NO_TEST,
    TEST_SPLITS,
    FolderTree,
    choose_splits,
    listed,
    notice,
    notice_left_out,
    refuse_several,
)
from tla_service.data.zip_tree import open_tree, with_parents
from tla_service.errors import ConfigError, UnavailableError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
# Left out unopened: opening a million annotation files would take minutes.
_TEXT_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".log"})
_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".rar"})
_TINY_FIX = "use the original layout: wnids.txt, train/<wnid>/images, val/images, val/val_annotations.txt"
_FIX = (
    "use train/<class>/<image> and test/<class>/<image> (or val/), or name the folders by data.train (. is the root) "
    "and data.test"
)


class _Part(NamedTuple):
    """The files of one split: images with their classes, and those beside and in the class folders that are none."""

    images: list[tuple[str, str]]
    beside: list[str]
    others: list[str]


def load_image_folder(config: DataConfig) -> Splits:
    """Load class folders; images are cropped to a centered square and resized to ``data.image_size``.

    Classes are the folders under ``train/``, sorted by name; images are sorted by path. Files are images by their
    ending, or else by their content. RGB, unless all of up to 64 images looked at are grey.
    """
    if config.image_size is None:
        remedy = "give a side in pixels, like 64"
        raise ConfigError("data.image_size", None, "images of folders come in any size", remedy)
    tree = open_tree(required_root(config))
    base, folders, tests, validations = _layout(tree, config)
    train_folder = base if folders[0] == "." else f"{base}{folders[0]}/"
    train = _split(tree, train_folder, tuple(f"{base}{name}/" for name in folders[1:]))
    if not train.images:
        raise _no_images(tree, train_folder, _FIX)
    below = (name.removeprefix(train_folder) for name in tree.folders if name.startswith(train_folder))
    others = {f"{base}{name}"[len(train_folder) :] for name in folders[1:] if f"{base}{name}".startswith(train_folder)}
    full = {_key(name) for _, name in train.images}
    # Empty ones, too, but not folders that only hold other splits.
    tops = (
        name for name in sorted(below) if "/" not in name and (_key(name) in full or name not in with_parents(others))
    )
    classes = {_key(name): name for name in tops}
    empty = sorted(set(classes) - full)
    if empty:
        reason = f"class {classes[empty[0]]!r} has no training images"
        raise ConfigError("data.name", config.name, reason, "add some, or remove it")
    numbers = {key: number for number, key in enumerate(sorted(classes, key=classes.__getitem__))}
    found, parts = {folders[0]: train}, {"train": train}
    for role, names in (("test", tests), ("validation", validations)):
        left = {name: _split(tree, f"{base}{name}/") for name in names if name not in found}
        # Published test sets often have no labels.
        known = (name for name, part in left.items() if any(_key(inside) in numbers for _, inside in part.images))
        first = next(iter(left), None) if role == "test" or config.validation else None
        name = next(known, first)
        if name is None:
            continue
        if not left[name].images:
            remedy = f"add class folders, or {HOLD_OUT}" if role == "test" else _FIX
            raise _no_images(tree, f"{base}{name}/", remedy)
        parts[role] = found[name] = left[name]
        if role == "test" and name != names[0]:
            shown = tree.describe(f"{base}{names[0]}")
            notice("%s has no images in the class folders of %s/; testing on %s/ instead", shown, folders[0], name)
    for name, part in found.items():
        strange = sorted({inside for _, inside in part.images if _key(inside) not in numbers})
        if strange:
            shown = tree.describe(f"{base}{name}/{strange[0]}")
            raise UnavailableError("data.root", shown, f"has no folder of this name under {folders[0]}/", _FIX)
    used = tuple(base if name == "." else f"{base}{name}/" for name in found)
    unused = tuple(f"{base}{name}/" for name in folders if name not in found)
    outside = (name for name in tree.names if not name.startswith(used) or name.startswith(unused))
    left_out = {
        "beside the class folders": [name for part in found.values() for name in part.beside],
        "in class folders that are not images": [name for part in found.values() for name in part.others],
        f"outside {', '.join(f'{name}/' for name in found)}": [name for name in outside if _ending(name) in _SUFFIXES],
    }
    notice_left_out(config.root, left_out)
    images = {role: [(path, numbers[_key(inside)]) for path, inside in part.images] for role, part in parts.items()}
    return tree_splits(config, tree, images, tuple(sorted(classes.values())))


def _layout(tree: FolderTree, config: DataConfig) -> tuple[str, list[str], list[str], list[str]]:
    """The folder that holds the splits ("" or with a trailing slash), and names of folders in it.

    The first are the training folder and all folders that belong to no class if they lie in it; the others are possible
    test and validation folders, as in `choose_splits`.
    """
    train = config.train or "train"
    below = with_parents({posixpath.dirname(name) for name in tree.names})
    found: defaultdict[str, set[str]] = defaultdict(set)
    for folder in below:
        for name in (train, *(TEST_SPLITS if config.test is None else [config.test])):
            if f"/{folder}".endswith(f"/{name}"):
                found[folder.removesuffix(name)].add(name)
    if train == ".":
        found = defaultdict(set, {"": {".", *found[""]}})
    enough = 1 if config.test_fraction is not None else 2
    whole = {base: parts for base, parts in found.items() if train in parts and len(parts) >= enough}
    # Classes may have the names of splits, too.
    inside = tuple(f"{base}{part}/" for base, parts in whole.items() for part in parts)
    bases = sorted(base for base, parts in found.items() if train in parts and not base.startswith(inside))
    sets = [base for base in bases if base in whole]
    refuse_several(config.root, sets)
    base = next(iter([*sets, *bases]), "")
    there = {"."} | {name.removeprefix(base) for name in below if name.startswith(base)}
    _, tests, validations = choose_splits(config, there)
    if not bases:
        folders = sorted(name for name in there if "/" not in name and name != ".")
        packed = [name for name in tree.names if "/" not in name and _ending(name) in _ARCHIVES]
        reason = "no train/ folder with files in it"
        reason += f", but {listed([*folders, *packed])}" if folders or packed else ""
        raise UnavailableError("data.root", tree.path, reason, f"unpack {packed[0]}, and {_FIX}" if packed else _FIX)
    if not tests and config.test_fraction is None:
        raise UnavailableError("data.root", tree.path, f"has {train}/ but no test/ or val/ beside it", NO_TEST)
    others = {*TEST_SPLITS, *tests, *validations} & there - {train}
    return base, [train, *sorted(others)], tests, validations


def _split(tree: FolderTree, folder: str, but: tuple[str, ...] = ()) -> _Part:
    """Sort the files under a folder, except for those in other splits."""
    part = _Part([], [], [])
    for name in (name for name in tree.names if name.startswith(folder) and not name.startswith(but)):
        inside, below, _ = name.removeprefix(folder).partition("/")
        if not below:
            part.beside.append(name)
        elif _is_image(tree, name):
            part.images.append((name, inside))
        else:
            part.others.append(name)
    return part


def _no_images(tree: FolderTree, folder: str, remedy: str) -> UnavailableError:
    return UnavailableError("data.root", tree.describe(folder), "holds no images in class folders", remedy)


def _is_image(tree: FolderTree, name: str) -> bool:
    ending = _ending(name)
    if ending in _SUFFIXES or ending in _TEXT_SUFFIXES:
        return ending in _SUFFIXES
    with tree.open(name) as handle:
        return is_image(handle)


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _key(name: str) -> str:
    """The same for all spellings of a name: macOS splits accents from their letters."""
    return unicodedata.normalize("NFC", name)


def load_tiny_imagenet(config: DataConfig) -> Splits:
    """Load Tiny ImageNet, with any number of its classes, from its zip file or the unpacked folder.

    The validation images with their annotations are the test set: the real test set has no labels. Classes are the
    lines of ``wnids.txt``, sorted; grey JPEGs become RGB.
    """
    tree = open_tree(required_root(config), "tiny-imagenet*.zip")
    bases = [name.removesuffix("wnids.txt") for name in tree.names if PurePosixPath(name).name == "wnids.txt"]
    if not bases:
        raise UnavailableError("data.root", tree.path, "no wnids.txt in it", _TINY_FIX)
    refuse_several(config.root, bases)
    base = bases[0]  # "", or a folder with a trailing slash
    wnids = sorted(set(_text(tree, f"{base}wnids.txt").split()))
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    pattern = re.compile(rf"{re.escape(base)}train/([^/]+)/images/[^/]+\.(?i:jpe?g)")
    matches = [match for name in tree.names if (match := pattern.fullmatch(name)) and match[1] in numbers]
    train = [(match[0], numbers[match[1]]) for match in matches]
    empty = sorted(numbers.keys() - {match[1] for match in matches})
    if empty:
        reason = f"{len(empty)} of the {len(wnids)} classes in wnids.txt have no training images, {empty[0]} first"
        raise ConfigError("data.name", "tiny_imagenet", reason, "fetch the whole set, or cut wnids.txt down")
    annotations = f"{base}val/val_annotations.txt"
    annotated = parse_annotations(_text(tree, annotations), numbers, tree.describe(annotations))
    test = [(f"{base}val/images/{name}", number) for name, number in annotated]
    present = set(tree.names)
    missing = next((name for name, _ in test if name not in present), None)
    if missing is not None:
        raise UnavailableError("data.root", tree.describe(missing), "is missing", _TINY_FIX)
    names = _class_names(tree, base, wnids)
    return tree_splits(config, tree, {"train": train, "test": test}, names, colour=True)


def parse_annotations(text: str, numbers: dict[str, int], shown: str) -> list[tuple[str, int]]:
    """Names and labels from ``val_annotations.txt``, lines of name, tab, wnid and box; only wnids with a number."""
    found: list[tuple[str, int]] = []
    for place, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if not name or not wnid or PurePosixPath(name).name != name:
            raise UnavailableError("data.root", f"{shown}, line {place}", "is not: file name, tab, wnid", _TINY_FIX)
        if wnid in numbers:
            found.append((name, numbers[wnid]))
    if not found:
        raise UnavailableError("data.root", shown, "annotates no image of the classes in wnids.txt", _TINY_FIX)
    return found


def _text(tree: FolderTree, name: str) -> str:
    if name not in tree.names:
        raise UnavailableError("data.root", tree.describe(name), "is missing", _TINY_FIX)
    return tree.read(name).decode("utf-8", errors="replace")


def _class_names(tree: FolderTree, base: str, wnids: list[str]) -> tuple[str, ...]:
    """The first synonym of ``words.txt`` where there is one and no other class has it, else the wnid."""
    words = _text(tree, f"{base}words.txt") if f"{base}words.txt" in tree.names else ""
    lines = (line.partition("\t") for line in words.split("\n"))
    synonyms = {wnid.strip(): text.split(",")[0].strip() for wnid, _, text in lines}
    names = [synonyms.get(wnid) or wnid for wnid in wnids]
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else wnid for name, wnid in zip(names, wnids, strict=True))
