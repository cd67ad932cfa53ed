"""Folders of images: train/<class>/... and test/<class>/..., or the same in a zip file."""

from pathlib import PurePosixPath

import torch

from tla_service.config import DataConfig
from tla_service.data.encoded import build_splits
from tla_service.data.sources import Splits
from tla_service.data.storage import required_root
from tla_service.data.trees import FileTree, TreeBlobs, open_tree
from tla_service.errors import ConfigError, UnavailableError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
_TEST_FOLDERS = ("test", "val", "validation")
_FIX = "use the layout train/<class>/<image> and test/<class>/<image> (or val/)"


def load_image_folder(config: DataConfig) -> Splits:
    """Load class folders; images are cropped to a centred square and resized to ``data.image_size``.

    Classes are the folders under ``train/``, sorted by name; images are sorted by path. RGB, unless all of up to 64
    images looked at are grey.

    Raises:
        ConfigError: If ``data.image_size`` is not set, or a class has no images.
        UnavailableError: If folders are missing, or the test set has a class that the training set has not.
    """
    if config.image_size is None:
        remedy = "give a side in pixels, like 64"
        raise ConfigError("data.image_size", None, "images of folders come in any size", remedy)
    tree = open_tree(required_root(config))
    base, test_folder = _layout(tree)
    train = _images(tree, f"{base}train/")
    test = _images(tree, f"{base}{test_folder}/")
    classes = sorted(_classes(tree, f"{base}train/"))
    empty = sorted(set(classes) - {name for _, name in train})
    if empty:
        reason = f"class {empty[0]!r} has no training images"
        raise ConfigError("data.name", config.name, reason, "add some, or remove it")
    strange = sorted({name for _, name in test} - set(classes))
    if strange:
        shown = tree.describe(f"{base}{test_folder}/{strange[0]}")
        raise UnavailableError("data.root", shown, "has no folder of this name under train/", _FIX)
    numbers = {name: number for number, name in enumerate(classes)}
    names = {"train": [path for path, _ in train], "test": [path for path, _ in test]}
    return build_splits(
        config,
        tree.key([*names["train"], *names["test"]]),
        {"train": TreeBlobs(tree, names["train"]), "test": TreeBlobs(tree, names["test"])},
        {
            "train": torch.tensor([numbers[name] for _, name in train]),
            "test": torch.tensor([numbers[name] for _, name in test]),
        },
        tuple(classes),
    )


def _layout(tree: FileTree) -> tuple[str, str]:
    """The folder that holds train/ ("" or with a trailing slash), and the name of the test folder beside it."""
    tops = {PurePosixPath(name).parts[:2] for name in tree.names}
    folders = sorted({part[0] for part in tops})
    bases = ["", *(f"{folder}/" for folder in folders)]
    for base in bases:
        if not any(name.startswith(f"{base}train/") for name in tree.names):
            continue
        for test_folder in _TEST_FOLDERS:
            if any(name.startswith(f"{base}{test_folder}/") for name in tree.names):
                return base, test_folder
        raise UnavailableError("data.root", tree.path, "has train/ but no test/ or val/ beside it", _FIX)
    raise UnavailableError("data.root", tree.path, "no train/ folder with files in it", _FIX)


def _images(tree: FileTree, folder: str) -> list[tuple[str, str]]:
    """Path and class of every image under a folder."""
    found = []
    for name in tree.names:
        if name.startswith(folder) and PurePosixPath(name).suffix.lower() in _SUFFIXES:
            inside = name.removeprefix(folder).split("/")
            if len(inside) >= 2:
                found.append((name, inside[0]))
    if not found:
        raise UnavailableError("data.root", tree.describe(folder), "holds no images in class folders", _FIX)
    return found


def _classes(tree: FileTree, folder: str) -> set[str]:
    """Names of the class folders; a folder of a local tree counts even when it is empty."""
    below = (name.removeprefix(folder) for name in tree.names if name.startswith(folder))
    inside = {name.split("/")[0] for name in below if "/" in name}
    local = tree.path / folder
    if local.is_dir():
        inside |= {entry.name for entry in local.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    return inside
