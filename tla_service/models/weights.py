"""Reads weights as others publish them, and matches them to a network of this project."""

import functools
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from tla_service.errors import ConfigError, UnavailableError, one_line
from tla_service.models.catalog import normalization_with
from tla_service.models.classifier import ImageClassifier

Entries = dict[str, dict[str, Tensor]]

_DEPTH = 3  # of nested mappings: {"model": {"net": {...}}}
_COUNTER = "num_batches_tracked"
_UNUSED = ("sub_block1.",)  # a block of TRADES' networks that they never use
_REMEDY = "choose model.name and data to match the network"
_NEW_HEAD = "set model.head to new, which draws the last linear layer"
# Names under which wrappers store the normalization, which is part of the configuration here.
_NORMALIZATION = {
    "mu": "mean", "mean": "mean", "new_mean": "mean", "sigma": "std", "std": "std", "new_std": "std",
}  # fmt: skip
_AVERAGE = re.compile(r"(?<![A-Za-z])ema(?![a-z])|Ema(?![a-z])|(?<![A-Z])EMA")  # a word of a name; not in schema
_LAYER = ("weight", "bias", "running_mean", "running_var")
_SHOWN = 3


class Fit(NamedTuple):
    """Weights of a network (float32, under its names), and notes on which part of the file was used."""

    state_dict: dict[str, Tensor]
    notes: tuple[str, ...]


class _Sought(NamedTuple):
    """What is searched for: the tensors of a network by its names, without a head that is drawn anew."""

    network: ImageClassifier
    tensors: dict[str, Tensor]
    required: list[str]  # names of the tensors that every file must have
    head: tuple[str, ...]
    new_head: bool | None
    namings: list[dict[str, str]]  # our names, head included -> names in a file: ours, or the publisher's


class _Copy(NamedTuple):
    """A place in a file that has all tensors of a network: the entry, and the prefix of their names."""

    entry: str
    prefix: str
    tensors: dict[str, Tensor]  # by the network's names

    @property
    def name(self) -> str:
        return ".".join(filter(None, (self.entry, self.prefix.rstrip(".")))) or "the weights at the top"


def read_entries(path: Path) -> Entries:
    """The tensors of a safetensors or PyTorch file by entry and name; no code in it is run."""
    if not path.is_file():
        raise UnavailableError("file", path, "there is no such file", "give a file of weights")
    with path.open("rb") as file:
        start = file.read(40)
    _check_kind(path, start)
    return dict(_entries(_loaded(path, start)))


def fit(entries: Entries, network: ImageClassifier, source: str, *, new_head: bool | None = None) -> Fit:
    """Find a network's weights among the entries of a file, which `source` names in messages.

    Prefixes of wrappers (``module.``, ``model.``, ``module.model.``, ...) are dropped, and publishers' names are
    supported. A normalization stored with the weights must be the network's. Of several copies, an exponential moving
    average is preferred, as in timm and torchvision. With ``new_head``, the last linear layer of the file is left out;
    None if a new one is not an option. Raises `ConfigError` if they do not fit.
    """
    sought = _sought(network, new_head)
    if not sought.required:
        reason = "the network is a single linear layer, so that a new head would leave out all weights"
        raise ConfigError("file", source, reason, "set model.head to keep")
    copies = [copy for entry, tensors in entries.items() for copy in _copies(entry, tensors, sought)]
    if not copies:
        raise _mismatch(entries, sought, source)
    chosen = min(copies, key=lambda copy: not _AVERAGE.search(copy.name))  # the first of equals
    _check_tensors(chosen, sought, source)
    notes = [_compare(chosen, other) for other in copies if other is not chosen]
    aside = _left_over(chosen, entries[chosen.entry], copies, sought, source)
    if aside:
        more = f" and {len(aside) - _SHOWN} more" if len(aside) > _SHOWN else ""
        notes.append(f"ignored, not part of the network: {', '.join(aside[:_SHOWN])}{more}")
    state = {name: value.float() if value.is_floating_point() else value for name, value in chosen.tensors.items()}
    return Fit(state, tuple(notes))


def _check_kind(path: Path, start: bytes) -> None:
    """Refuse other files, by their content rather than their name."""
    bad = functools.partial(UnavailableError, "file", path)
    if start.startswith(b"version https://git-lfs"):
        raise bad("a Git LFS pointer, not the file itself", "fetch it with: git lfs pull")
    if start.lstrip().startswith(b"<"):
        raise bad("a web page, not weights", "download the file that the page links to")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            remedy = "load it with torch.jit.load where you trust it, and save its state_dict()"
            raise bad("a TorchScript program, which would run code", remedy)
        if not any(name.endswith("data.pkl") for name in names):
            remedy = "unpack it, and give the .pt or .safetensors file in it"
            raise bad("a zip archive that torch.save did not write", remedy)
    elif not (start.startswith((b"PK", b"\x80")) or _is_safetensors(start)):
        remedy = "save a network's state_dict() with torch.save or safetensors"
        raise bad("neither a PyTorch file nor safetensors", remedy)


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{"


def _loaded(path: Path, start: bytes) -> Any:
    try:
        return load_file(path) if _is_safetensors(start) else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        reason, remedy = f"truncated or damaged ({one_line(error)})", "download it again"
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            found = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"contains more than weights{f' ({found[1]})' if found else ''}, and loading it would run code"
            remedy = "save only its state_dict where you trust it, preferably as .safetensors"
        raise UnavailableError("file", path, reason, remedy) from error


def _entries(loaded: Any, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping that contains tensors, by the keys that lead to it; outer ones first."""
    if not isinstance(loaded, Mapping):
        return
    # torch.compile prefixes names by _orig_mod.
    tensors = {str(key).replace("_orig_mod.", ""): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if tensors:
        yield name, tensors
    if depth:
        for key, value in loaded.items():
            yield from _entries(value, f"{name}.{key}" if name else str(key), depth - 1)


def _sought(network: ImageClassifier, new_head: bool | None) -> _Sought:  # noqa: FBT001
    tensors = network.state_dict()
    path = next(path for path, module in network.named_modules() if module is network.classifier)
    head = tuple(f"{path}.{part}" for part in network.classifier.state_dict())
    ours, published = {name: name for name in tensors}, network.published_names()
    kept = {name: value for name, value in tensors.items() if not (new_head and name in head)}
    required = [name for name in kept if not name.endswith(_COUNTER)]
    return _Sought(network, kept, required, head, new_head, [ours] if published == ours else [ours, published])


def _copies(entry: str, tensors: Mapping[str, Tensor], sought: _Sought) -> Iterator[_Copy]:
    """Every place of an entry that has all tensors of the network, shortest prefix first."""
    wanted = sought.tensors
    for names in sought.namings:
        for prefix in _prefixes(tensors, names[sought.required[-1]]):
            found = {name: tensors[prefix + names[name]] for name in wanted if prefix + names[name] in tensors}
            # PyTorch before 0.4.1 had no such counters; eval mode does not read them.
            found |= {name: wanted[name] for name in set(wanted) - set(found) if name.endswith(_COUNTER)}
            if len(found) == len(wanted):
                yield _Copy(entry, prefix, {name: found[name] for name in wanted})


def _prefixes(tensors: Mapping[str, Tensor], *names: str) -> list[str]:
    """Prefixes of any of the names, shortest first."""
    found = {key.removesuffix(name) for name in names for key in tensors if key == name or key.endswith(f".{name}")}
    return sorted(found, key=len)


def _mismatch(entries: Entries, sought: _Sought, source: str) -> ConfigError:
    """The tensors missing under the entry and prefix that have most of the network's."""
    best: tuple[int, list[str], list[str]] = (0, [], [])  # how many are there, names of those missing: in a file, ours
    wanted = sought.required
    for tensors in entries.values():
        for names in sought.namings:
            for prefix in ("", *_prefixes(tensors, *(names[name] for name in wanted))):
                missing = [name for name in wanted if prefix + names[name] not in tensors]
                theirs = [prefix + names[name] for name in missing]
                best = max(best, (len(wanted) - len(missing), theirs, missing), key=lambda found: found[0])
    count, theirs, missing = best
    reason, remedy = f"contains none of this network's weights ({len(entries)} entries with tensors)", _REMEDY
    if count:
        reason = f"does not match this network ({_listed(theirs, 'is missing')})"
        if sought.new_head is False and set(missing) <= set(sought.head):
            remedy = _NEW_HEAD
    return ConfigError("file", source, reason, remedy)


def _check_tensors(copy: _Copy, sought: _Sought, source: str) -> None:
    wanted = sought.tensors
    shapes = {name: (tuple(value.shape), tuple(wanted[name].shape)) for name, value in copy.tensors.items()}
    wrong = [name for name, (theirs, ours) in shapes.items() if theirs != ours]
    if wrong and all(name in sought.head and shapes[name][0][1:] == shapes[name][1][1:] for name in wrong):
        classes = {shapes[name][0][0] for name in sought.head}
        if len(classes) == 1:
            reason = f"its head has {classes.pop()} classes, the data has {sought.network.classifier.out_features}"
            raise ConfigError("file", source, reason, _REMEDY if sought.new_head is None else _NEW_HEAD)
    problems = [f"{name} is {shapes[name][0]}, not {shapes[name][1]}" for name in wrong]
    problems += [
        f"{name} has type {str(value.dtype).removeprefix('torch.')}"
        for name, value in copy.tensors.items()
        if value.is_floating_point() != wanted[name].is_floating_point()
    ]
    if problems:
        raise ConfigError("file", source, f"does not match this network ({_listed(problems)})", _REMEDY)
    broken = [name for name, value in copy.tensors.items() if not torch.isfinite(value.float()).all()]
    if broken:
        reason = f"{_listed(broken)}: values are not finite"
        raise ConfigError("file", source, reason, "take a checkpoint from before the training diverged")


def _left_over(
    chosen: _Copy, tensors: Mapping[str, Tensor], copies: list[_Copy], sought: _Sought, source: str
) -> list[str]:
    """Unused names of the entry; refuses those that would change what the network computes."""
    mine = {f"{copy.prefix}{theirs}" for copy in copies for names in sought.namings for theirs in names.values()}
    unused = tuple(f"{chosen.prefix}{name}" for name in _UNUSED)
    others = {name: value for name, value in tensors.items() if name not in mine and not name.startswith(unused)}
    normalization = {name: value for name, value in others.items() if name.rpartition(".")[2] in _NORMALIZATION}
    _check_normalization(normalization, sought.network, source)
    rest = [name for name in others if name not in normalization]
    inside = [name for name in rest if not chosen.prefix or name.startswith(chosen.prefix)]
    layers = inside or [name for name in rest if name.rpartition(".")[2] in _LAYER]
    if layers:
        remedy = "choose model.name to match the network, or save only the network's state_dict()"
        raise ConfigError("file", source, f"contains more than this network ({_listed(layers, 'is unused')})", remedy)
    return rest


def _check_normalization(stored: Mapping[str, Tensor], network: ImageClassifier, source: str) -> None:
    kinds = {name: _NORMALIZATION[name.rpartition(".")[2]] for name in stored}
    for name, value in stored.items():
        mine: Any = getattr(network.normalization, kinds[name], None)
        rounding = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        is_alike = isinstance(mine, Tensor) and mine.numel() == value.numel()
        if not (is_alike and torch.allclose(mine.flatten(), value.flatten().float(), atol=1e-4 + rounding, rtol=0)):
            numbers = [round(number, 4) for number in value.flatten().float().tolist()]
            statistics = {kind: stored[each].flatten().tolist() for each, kind in kinds.items()}
            known = normalization_with(statistics.get("mean", []), statistics.get("std", []))
            remedy = f"set model.normalization to {known}" if known else "no model.normalization matches"
            reason = f"its normalization, {name} = {numbers}, is not the network's"
            raise ConfigError("file", source, reason, remedy)


def _compare(chosen: _Copy, other: _Copy) -> str:
    same = all(torch.equal(value, other.tensors[name]) for name, value in chosen.tensors.items())
    return f"{chosen.name} is used; {other.name} has {'the same' if same else 'other'} weights and is ignored"


def _listed(names: list[str], suffix: str = "") -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} {suffix}".rstrip() + more
