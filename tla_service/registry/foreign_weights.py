"""Weights as others publish them: which file it is, which of its entries fits a network, and under which names."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tla_service.errors import ConfigError, UnavailableError
from tla_service.models import ImageClassifier
from tla_service.models.catalog import normalization_with
from tla_service.tracking.connection import one_line

Entries = dict[str, dict[str, Tensor]]

# How deep a checkpoint may keep its weights: {"model": {"net": {...}}}.
_DEPTH = 3
_COUNTER = "num_batches_tracked"
# A block that TRADES' networks carry and never use.
_UNUSED = ("sub_block1.",)
# Normalisation as wrappers store it, which lives in the network's configuration here.
_NORMALIZATION = {
    "mu": "mean", "mean": "mean", "new_mean": "mean", "sigma": "std", "std": "std", "new_std": "std",
}  # fmt: skip
_LAYER = ("weight", "bias", "running_mean", "running_var")
_SHOWN = 3


class Fit(NamedTuple):
    """Weights that fit a network.

    Attributes:
        state_dict: Tensors under the network's names, float32.
        notes: What of the file was used and what was not, where that is not plain.
    """

    state_dict: dict[str, Tensor]
    notes: tuple[str, ...]


class _Copy(NamedTuple):
    """Where a file holds all tensors of a network: the entry, and what stands before their names."""

    entry: str
    prefix: str
    tensors: dict[str, Tensor]  # by the network's names

    @property
    def name(self) -> str:
        return ".".join(filter(None, (self.entry, self.prefix.rstrip(".")))) or "the weights at the top"


def read_entries(path: Path) -> Entries:
    """The tensors of a file, by the entry that holds them and by name; nothing in it is run.

    Args:
        path: Safetensors, or anything that ``torch.load`` reads with ``weights_only=True``.

    Raises:
        UnavailableError: There is no such file, it is of another kind or damaged, or it holds more than weights.
    """
    if not path.is_file():
        raise UnavailableError("file", path, "there is no such file", "give the weights' file")
    with path.open("rb") as file:
        start = file.read(40)
    _check_kind(path, start)
    return dict(_entries(_loaded(path, start)))


def fit(entries: Entries, network: ImageClassifier, source: str) -> Fit:
    """Find a network's weights among the entries of a file, after checking that each has its place.

    What wrappers put before names (``module.``, ``model.``, ``module.model.``, ...) is dropped, and torchvision's own
    names are known. A normalisation that is stored beside the weights must be the network's own. Of several copies a
    moving average is taken, as timm and torchvision do.

    Args:
        entries: As :func:`read_entries` gives them.
        network: The network, in its names.
        source: The file, for messages.

    Raises:
        ConfigError: Some are missing, left over, of other shapes, not finite, or the normalisation is another.
    """
    copies = [copy for entry, tensors in entries.items() for copy in _copies(entry, tensors, network)]
    if not copies:
        raise _nearest(entries, network, source)
    chosen = min(copies, key=lambda copy: ("ema" not in copy.name.lower(), copies.index(copy)))
    _check_tensors(chosen, network, source)
    notes = [_compare(chosen, other) for other in copies if other is not chosen]
    aside = _left_over(chosen, entries[chosen.entry], copies, network, source)
    if aside:
        more = f" and {len(aside) - _SHOWN} more" if len(aside) > _SHOWN else ""
        notes.append(f"left out, since no layer of the network: {', '.join(aside[:_SHOWN])}{more}")
    state = {name: value.float() if value.is_floating_point() else value for name, value in chosen.tensors.items()}
    return Fit(state, tuple(notes))


# ------------------------------------------------------------------------------------------------------- the file


def _check_kind(path: Path, start: bytes) -> None:
    """Refuse what is no file of weights, by its content: names lie."""
    if start.startswith(b"version https://git-lfs"):
        raise UnavailableError("file", path, "a Git LFS pointer, not the file itself", "fetch it with: git lfs pull")
    if start.lstrip().startswith(b"<"):
        raise UnavailableError("file", path, "a web page, not weights", "download the file that the page links to")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            remedy = "load it with torch.jit.load where it comes from, and save its state_dict()"
            raise UnavailableError("file", path, "a TorchScript program, which would have to be run", remedy)
        if not any(name.endswith("data.pkl") for name in names):
            remedy = "unpack it, and give the .pt or .safetensors file in it"
            raise UnavailableError("file", path, "a zip archive, but not one that torch.save wrote", remedy)
    elif not (start.startswith((b"PK", b"\x80")) or _is_safetensors(start)):
        reason = "neither a PyTorch file nor safetensors"
        raise UnavailableError("file", path, reason, "save a network's state_dict() with torch.save or safetensors")


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{"


def _loaded(path: Path, start: bytes) -> Any:
    from safetensors.torch import load_file

    try:
        if _is_safetensors(start):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if "Unsupported" not in str(error):
            raise _damaged(path, error) from error
        what = f" ({found[1]})" if found else ""
        reason = f"holds more than weights{what}, and loading it would run code"
        remedy = "where it comes from, save its state_dict alone, best as .safetensors"
        raise UnavailableError("file", path, reason, remedy) from error
    except Exception as error:  # a damaged pickle ends in any of them
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UnavailableError:
    return UnavailableError("file", path, f"cut short or damaged ({one_line(error)})", "fetch it again")


def _entries(loaded: Any, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping that holds tensors, by the keys that lead to it; entries before what is in them."""
    if not isinstance(loaded, Mapping):
        return
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if tensors:
        yield name, tensors
    if depth:
        for key, value in loaded.items():
            yield from _entries(value, f"{name}.{key}" if name else str(key), depth - 1)


# ------------------------------------------------------------------------------------------------------ the network


def _copies(entry: str, tensors: Mapping[str, Tensor], network: ImageClassifier) -> Iterator[_Copy]:
    """Every place where the entry holds all that the network wants, shortest prefix first."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    for names in _namings(network):
        for prefix in _prefixes(plain, names[_kept(network)[-1]]):
            found = {ours: plain[prefix + theirs] for ours, theirs in names.items() if prefix + theirs in plain}
            wanted = network.state_dict()
            # Networks of before 2018 have no such counters; nothing in eval mode reads them.
            found |= {name: wanted[name] for name in set(wanted) - set(found) if name.endswith(_COUNTER)}
            if len(found) == len(wanted):
                yield _Copy(entry, prefix, {name: found[name] for name in wanted})


def _namings(network: ImageClassifier) -> list[dict[str, str]]:
    """Our names of the network's tensors -> names that a file may have for them: ours, and the publisher's."""
    ours = {name: name for name in network.state_dict()}
    published = network.published_names()
    return [ours] if published == ours else [ours, published]


def _kept(network: ImageClassifier) -> list[str]:
    """Names of the tensors that no file can do without."""
    return [name for name in network.state_dict() if not name.endswith(_COUNTER)]


def _prefixes(tensors: Mapping[str, Tensor], *names: str) -> list[str]:
    """What stands before any of the names, shortest first."""
    found = {key.removesuffix(name) for name in names for key in tensors if key == name or key.endswith(f".{name}")}
    return sorted(found, key=len)


def _nearest(entries: Entries, network: ImageClassifier, source: str) -> ConfigError:
    """What is wrong with the entry and the prefix under which most of the network's tensors are found."""
    remedy = "choose model.name and data so that the network is theirs"
    best: tuple[int, list[str]] = (0, [])
    wanted = _kept(network)
    for tensors in entries.values():
        for names in _namings(network):
            for prefix in ("", *_prefixes(tensors, *(names[name] for name in wanted))):
                missing = [prefix + names[name] for name in wanted if prefix + names[name] not in tensors]
                best = max(best, (len(wanted) - len(missing), missing), key=lambda found: found[0])
    count, missing = best
    if not count:
        reason = f"hold none of this network's weights ({len(entries)} entries with tensors)"
        return ConfigError("file", source, reason, remedy)
    return ConfigError("file", source, f"are not this network's weights ({_listed(missing, 'is missing')})", remedy)


def _check_tensors(copy: _Copy, network: ImageClassifier, source: str) -> None:
    wanted = network.state_dict()
    shapes = {name: (tuple(value.shape), tuple(wanted[name].shape)) for name, value in copy.tensors.items()}
    problems = [f"{name} is {theirs}, not {ours}" for name, (theirs, ours) in shapes.items() if theirs != ours]
    problems += [
        f"{name} holds {str(value.dtype).removeprefix('torch.')}"
        for name, value in copy.tensors.items()
        if value.is_floating_point() != wanted[name].is_floating_point()
    ]
    if problems:
        remedy = "choose model.name and data so that the network is theirs"
        raise ConfigError("file", source, f"are not this network's weights ({_listed(problems)})", remedy)
    broken = [name for name, value in copy.tensors.items() if not torch.isfinite(value.float()).all()]
    if broken:
        reason = f"{_listed(broken)}: values that are not finite"
        raise ConfigError("file", source, reason, "take a checkpoint from before the training diverged")


def _left_over(
    chosen: _Copy, tensors: Mapping[str, Tensor], copies: list[_Copy], network: ImageClassifier, source: str
) -> list[str]:
    """Names of the entry that nothing uses, after refusing those that would change what the network computes."""
    mine = {f"{copy.prefix}{names[name]}" for copy in copies for names in _namings(network) for name in copy.tensors}
    others = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    others = {name: value for name, value in others.items() if name not in mine}
    unused = tuple(f"{chosen.prefix}{name}" for name in _UNUSED)
    others = {name: value for name, value in others.items() if not name.startswith(unused)}
    normalization = {name: value for name, value in others.items() if name.rpartition(".")[2] in _NORMALIZATION}
    _check_normalization(normalization, network, source)
    rest = [name for name in others if name not in normalization]
    inside = [name for name in rest if not chosen.prefix or name.startswith(chosen.prefix)]
    layers = inside or [name for name in rest if name.rpartition(".")[2] in _LAYER]
    if layers:
        remedy = "choose model.name so that the network is theirs, or save the network's state_dict() alone"
        raise ConfigError("file", source, f"hold more than this network ({_listed(layers, 'has no place')})", remedy)
    return rest


def _check_normalization(stored: Mapping[str, Tensor], network: ImageClassifier, source: str) -> None:
    own = network.normalization
    for name, value in stored.items():
        kind = _NORMALIZATION[name.rpartition(".")[2]]
        mine: Any = getattr(own, kind, None)
        rounding = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        is_alike = isinstance(mine, Tensor) and mine.numel() == value.numel()
        if not (is_alike and torch.allclose(mine.flatten(), value.flatten().float(), atol=1e-4 + rounding, rtol=0)):
            numbers = [round(number, 4) for number in value.flatten().float().tolist()]
            reason = f"carry a normalisation, {name} = {numbers}"
            known = normalization_with(_stored(stored, "mean"), _stored(stored, "std"))
            remedy = f"set model.normalization to {known}" if known else "no model.normalization has it"
            raise ConfigError("file", source, f"{reason}, that is not the network's", remedy)


def _stored(stored: Mapping[str, Tensor], kind: str) -> list[float]:
    found = (value for name, value in stored.items() if _NORMALIZATION[name.rpartition(".")[2]] == kind)
    return next((value.flatten().float().tolist() for value in found), [])


def _compare(chosen: _Copy, other: _Copy) -> str:
    same = all(torch.equal(value, other.tensors[name]) for name, value in chosen.tensors.items())
    return f"{chosen.name} is used; {other.name} holds {'the same' if same else 'other'} weights and is left out"


def _listed(names: list[str], suffix: str = "") -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} {suffix}".rstrip() + more
