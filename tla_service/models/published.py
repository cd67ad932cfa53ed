"""Weights that torchvision and timm publish, from the caches of these libraries; nothing is downloaded."""

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from tla_service.errors import ConfigError, UnavailableError, one_line
from tla_service.models.weights import Entries, read_entries

_LIBRARIES = ("torchvision", "timm")


def published_entries(source: str, name: str) -> Entries | None:
    """Cached weights of the network ``name``, with their normalization; None if the source is no library.

    The source is ``torchvision`` or ``timm``, with the name of the weights after a colon if the network has several,
    such as ``torchvision:IMAGENET1K_V1`` or ``timm:a1_in1k``. ConfigError if the library has no such weights,
    UnavailableError, with the command that downloads them, if they are not in its cache.
    """
    library, _, which = source.partition(":")
    if library not in _LIBRARIES:
        return None
    if not name.startswith(f"{library}:"):
        remedy = f"use a network of {library}, such as --model.name {library}:resnet18, or give a file"
        raise ConfigError("model.pretrained", source, f"{library} has no weights of {name}", remedy)
    bare = name.removeprefix(f"{library}:")
    load = _torchvision if library == "torchvision" else _timm
    entries, mean, std = load(source, bare, which)
    # As in a file with its own normalization.
    statistics = {"mean": torch.tensor(mean), "std": torch.tensor(std)}
    return {name: {**tensors, **statistics} for name, tensors in entries.items()}


def _torchvision(source: str, name: str, which: str) -> tuple[Entries, Any, Any]:
    from torchvision import models

    if name in ("googlenet", "inception_v3"):
        reason = f"torchvision's {name} has auxiliary heads and a normalization of its own, which are not supported"
        raise ConfigError("model.pretrained", source, reason, "choose another network, or leave it out")
    kinds: Any = models.get_model_weights(name)
    try:
        weights = kinds[which or "DEFAULT"]
    except KeyError:
        raise _unknown(source, name, [kind.name for kind in kinds]) from None
    path = _hub_file(weights.url)
    if not path.is_file():
        call = f"import torchvision; torchvision.models.get_model('{name}', weights='{weights.name}')"
        raise _not_cached(source, path, call)
    transform = weights.transforms()
    return read_entries(path), transform.mean, transform.std


def _timm(source: str, name: str, tag: str) -> tuple[Entries, Any, Any]:
    import timm
    from huggingface_hub import try_to_load_from_cache

    base, _, own_tag = name.partition(".")
    full = ".".join(filter(None, (base, tag or own_tag)))
    try:
        facts: Any = timm.models.get_pretrained_cfg(full, allow_unregistered=False)
    except RuntimeError:
        facts = None
    if facts is None or not facts.has_weights or facts.custom_load:
        raise _unknown(source, base, [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")])
    repository, _, revision = (facts.hf_hub_id or "").partition("@")
    files = (facts.hf_hub_filename,) if facts.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    found = [try_to_load_from_cache(repository, file, revision=revision or None) for file in files if repository]
    found += [str(_hub_file(facts.url))] if facts.url else []
    path = next((Path(file) for file in found if isinstance(file, str) and Path(file).is_file()), None)
    if path is None:
        raise _not_cached(source, repository or facts.url, f"import timm; timm.create_model('{full}', pretrained=True)")
    entries = read_entries(path)
    tensors = next(entries[entry] for entry in ("", "state_dict", "model", *entries) if entry in entries)
    try:  # timm translates the names of the original publishers
        network = timm.create_model(full, pretrained=True, pretrained_cfg_overlay={"state_dict": tensors})
    except (RuntimeError, KeyError) as error:
        reason = f"timm cannot read {path} ({one_line(error)})"
        raise UnavailableError("model.pretrained", source, reason, "delete the file, and download it again") from error
    return {"": network.state_dict()}, facts.mean, facts.std


def _hub_file(url: str) -> Path:
    """Where `torch.hub` keeps the file of an address."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


def _unknown(source: str, name: str, known: list[str]) -> ConfigError:
    library = source.partition(":")[0]
    choices = ", ".join(f"{library}:{each}" for each in known)
    remedy = f"choose from {choices}" if known else "give a file of weights"
    return ConfigError("model.pretrained", source, f"{library} publishes no such weights of {name}", remedy)


def _not_cached(source: str, where: object, call: str) -> UnavailableError:
    reason = f"not in the cache of this machine ({where}), and nothing is downloaded unasked"
    return UnavailableError("model.pretrained", source, reason, f'download it with: python -c "{call}"')
