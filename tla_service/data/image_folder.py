"""Folders of images, also in a zip file: train/<class>/... and test/<class>/..., or the layout of Tiny ImageNet."""

import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container
from pathlib import PurePosixPath
from typing import NamedTuple

from tla_service.config import DataConfig
from tla_service.data.decoding import is_image
from tla_service.data.roots import required_root
from tla_service.data.sources import Splits, tree_splits
from tla_service.data.trees import TEST_SPLITS, FolderTree, notice, notice_left_out, refuse_several
from tla_service.data.zip_tree import open_tree
from tla_service.errors import ConfigError, UnavailableError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
# Left out unopened: opening a million annotation files would take minutes.
_TEXT_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".log"})
_TINY_FIX = "use the original layout: wnids.txt, train/<wnid>/images, val/images, val/val_annotations.txt"
_FIX = "use the layout train/<class>/<image> and test/<class>/<image> (or val/)"


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
    base, test_folders = _layout(tree, config.root)
    train_folder = f"{base}train/"
    train = _split(tree, train_folder)
    if not train.images:
        raise _no_images(tree, train_folder)
    below = (name.removeprefix(train_folder) for name in tree.folders if name.startswith(train_folder))
    classes = {_key(name): name for name in sorted(below) if "/" not in name}  # empty ones, too
    empty = sorted(set(classes) - {_key(name) for _, name in train.images})
    if empty:
        reason = f"class {classes[empty[0]]!r} has no training images"
        raise ConfigError("data.name", config.name, reason, "add some, or remove it")
    numbers = {key: number for number, key in enumerate(sorted(classes, key=classes.__getitem__))}
    test_folder, test = _labelled_test(tree, base, test_folders, numbers)
    strange = sorted({name for _, name in test.images if _key(name) not in numbers})
    if strange:
        shown = tree.describe(f"{base}{test_folder}/{strange[0]}")
        raise UnavailableError("data.root", shown, "has no folder of this name under train/", _FIX)
    used = (train_folder, f"{base}{test_folder}/")
    outside = (name for name in tree.names if not name.startswith(used) and _ending(name) in _SUFFIXES)
    left_out = {
        "beside the class folders": [*train.beside, *test.beside],
        "in class folders that are not images": [*train.others, *test.others],
        f"outside train/ and {test_folder}/": outside,
    }
    notice_left_out(config.root, left_out)
    parts = ([(path, numbers[_key(name)]) for path, name in part.images] for part in (train, test))
    return tree_splits(config, tree, next(parts), next(parts), tuple(sorted(classes.values())))


def _layout(tree: FolderTree, root: str | None) -> tuple[str, list[str]]:
    """The folder that holds train/ ("" or with a trailing slash), and the test folders beside it."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for folder in {posixpath.dirname(name) for name in tree.names}:
        parts = folder.split("/")
        for depth, part in enumerate(parts):
            if part == "train" or part in TEST_SPLITS:
                found["".join(f"{above}/" for above in parts[:depth])].add(part)
    whole = {base: parts for base, parts in found.items() if "train" in parts and len(parts) > 1}
    # Classes may have the names of splits, too.
    inside = tuple(f"{base}{part}/" for base, parts in whole.items() for part in parts)
    bases = [base for base, parts in found.items() if "train" in parts and not base.startswith(inside)]
    sets = [base for base in bases if base in whole]
    refuse_several(root, sets)
    if sets:
        return sets[0], [name for name in TEST_SPLITS if name in whole[sets[0]]]
    reason = "has train/ but no test/ or val/ beside it" if bases else "no train/ folder with files in it"
    raise UnavailableError("data.root", tree.path, reason, _FIX)


def _labelled_test(tree: FolderTree, base: str, folders: list[str], classes: Container[str]) -> tuple[str, _Part]:
    """The first test folder that holds images of known classes: published test sets often have no labels."""
    parts: list[_Part] = []
    for folder in folders:
        parts.append(_split(tree, f"{base}{folder}/"))
        if any(_key(name) in classes for _, name in parts[-1].images):
            if folder != folders[0]:
                shown = tree.describe(f"{base}{folders[0]}")
                notice("%s has no images in the class folders of train/; testing on %s/ instead", shown, folder)
            return folder, parts[-1]
    if not parts[0].images:
        raise _no_images(tree, f"{base}{folders[0]}/")
    return folders[0], parts[0]


def _split(tree: FolderTree, folder: str) -> _Part:
    """Sort the files under a folder."""
    part = _Part([], [], [])
    for name in (name for name in tree.names if name.startswith(folder)):
        inside, below, _ = name.removeprefix(folder).partition("/")
        if not below:
            part.beside.append(name)
        elif _is_image(tree, name):
            part.images.append((name, inside))
        else:
            part.others.append(name)
    return part


def _no_images(tree: FolderTree, folder: str) -> UnavailableError:
    return UnavailableError("data.root", tree.describe(folder), "holds no images in class folders", _FIX)


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
    return tree_splits(config, tree, train, test, _class_names(tree, base, wnids), colour=True)


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
