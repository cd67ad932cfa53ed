"""Tiny ImageNet in the layout of its zip file, with any number of its classes."""

import re
from collections import Counter
from pathlib import PurePosixPath

from tla_service.config import DataConfig
from tla_service.data.members import refuse_several
from tla_service.data.roots import required_root
from tla_service.data.sources import Splits, tree_splits
from tla_service.data.trees import FileTree
from tla_service.data.zip_tree import open_tree
from tla_service.errors import ConfigError, UnavailableError

_FIX = "use the original layout: wnids.txt, train/<wnid>/images, val/images, val/val_annotations.txt"


def load_tiny_imagenet(config: DataConfig) -> Splits:
    """Load Tiny ImageNet from its zip file, without unpacking it, or from the unpacked folder.

    The validation images with their annotations are the test set: the real test set has no labels. Classes are the
    lines of ``wnids.txt``, sorted; grey JPEGs become RGB.
    """
    tree = open_tree(required_root(config), "tiny-imagenet*.zip")
    bases = [name.removesuffix("wnids.txt") for name in tree.names if PurePosixPath(name).name == "wnids.txt"]
    if not bases:
        raise UnavailableError("data.root", tree.path, "no wnids.txt in it", _FIX)
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
        raise UnavailableError("data.root", tree.describe(missing), "is missing", _FIX)
    return tree_splits(config, tree, train, test, _class_names(tree, base, wnids), colour=True)


def parse_annotations(text: str, numbers: dict[str, int], shown: str) -> list[tuple[str, int]]:
    """File names and labels from ``val_annotations.txt``: one line per image with tab-separated name, wnid and box.

    Images of wnids without a number are left out. UnavailableError if a line has no wnid or a name is a path, or if no
    image is left.
    """
    found: list[tuple[str, int]] = []
    for place, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if not name or not wnid or PurePosixPath(name).name != name:
            raise UnavailableError("data.root", f"{shown}, line {place}", "is not: file name, tab, wnid", _FIX)
        if wnid in numbers:
            found.append((name, numbers[wnid]))
    if not found:
        raise UnavailableError("data.root", shown, "annotates no image of the classes in wnids.txt", _FIX)
    return found


def _text(tree: FileTree, name: str) -> str:
    if name not in tree.names:
        raise UnavailableError("data.root", tree.describe(name), "is missing", _FIX)
    return tree.read(name).decode("utf-8", errors="replace")


def _class_names(tree: FileTree, base: str, wnids: list[str]) -> tuple[str, ...]:
    """The first synonym of ``words.txt`` where there is one and no other class has it, else the wnid."""
    words = _text(tree, f"{base}words.txt") if f"{base}words.txt" in tree.names else ""
    lines = (line.partition("\t") for line in words.split("\n"))
    synonyms = {wnid.strip(): text.split(",")[0].strip() for wnid, _, text in lines}
    names = [synonyms.get(wnid) or wnid for wnid in wnids]
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else wnid for name, wnid in zip(names, wnids, strict=True))
