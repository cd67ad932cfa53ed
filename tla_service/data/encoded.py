"""From encoded images to sources: decoded once into the cache, or on demand."""

from collections.abc import Mapping, Sequence

import torch
from PIL import __version__ as PIL_VERSION

from tla_service.config import DataConfig
from tla_service.data.cache import cached_tensors, content_digest
from tla_service.data.decoding import Blobs, decode, probe
from tla_service.data.sources import SPLITS, ArraySource, FileSource, Split, Splits
from tla_service.data.trees import FileTree, TreeBlobs

# The largest training set, as decoded uint8 pixels, that data.residency=auto keeps in memory.
RESIDENT_BYTES = 4 * 2**30


def build_splits(
    config: DataConfig,
    key: str,
    blobs: Mapping[Split, Blobs],
    labels: Mapping[Split, torch.Tensor],
    class_names: tuple[str, ...],
    *,
    colour: bool | None = None,
) -> Splits:
    """Choose between memory and decoding on demand, by the size of the training set and ``data.residency``.

    Args:
        config: The data section.
        key: Part of a cache file's name; changes with the files, their order and content.
        blobs: Encoded images of both splits.
        labels: Their classes, (N,) each.
        class_names: Name of every class.
        colour: Whether images become RGB; ``None``: unless all are grey.
    """
    decoder = probe(blobs["train"], config.image_size, colour=colour)
    channels, height, width = decoder.image_shape
    size = len(blobs["train"]) * channels * height * width
    if config.residency == "stream" or (config.residency == "auto" and size >= RESIDENT_BYTES):
        train, test = (FileSource(blobs[split], labels[split], decoder) for split in SPLITS)
        return Splits(train, test, class_names)

    def build() -> dict[str, torch.Tensor]:
        return {split: decode(blobs[split], range(len(blobs[split])), decoder) for split in SPLITS}

    # Labels are not cached, so the key need not cover how they are read. JPEG pixels depend on the decoder's version.
    full_key = f"{key}-{channels}x{height}x{width}{'r' if decoder.resize else ''}-{PIL_VERSION}"
    images, digests = cached_tensors(config.cache_dir, full_key, build)
    arrays = (ArraySource(images[s], labels[s], content_digest(labels[s]) + digests[s]) for s in SPLITS)
    return Splits(next(arrays), next(arrays), class_names)


def tree_splits(
    config: DataConfig,
    tree: FileTree,
    images: Mapping[Split, Sequence[tuple[str, int]]],
    class_names: tuple[str, ...],
    *,
    colour: bool | None = None,
) -> Splits:
    """As `build_splits`, for images that are files of a tree: (name, class) of each."""
    names = {split: [name for name, _ in images[split]] for split in SPLITS}
    return build_splits(
        config,
        tree.key([*names["train"], *names["test"]]),
        {split: TreeBlobs(tree, names[split]) for split in SPLITS},
        {split: torch.tensor([label for _, label in images[split]]) for split in SPLITS},
        class_names,
        colour=colour,
    )
