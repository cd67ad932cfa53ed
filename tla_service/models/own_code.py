"""Networks from outside the package: ``package.module:factory``, installed or in a folder that travels with a run."""

import atexit
import contextlib
import functools
import importlib
import importlib.metadata
import io
import re
import shutil
import sys
import tempfile
import threading
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from tla_service.errors import ConfigError, UnavailableError, one_line, readable
from tla_service.pickles import is_pickle
from tla_service.pixels import ImageShape

REQUIREMENTS = "requirements.txt"
_FIELD = "model.code"
_MOST_BYTES = 50_000_000
_PREFIX = "tla-code-"
_OURS = {"numpy", "timm", "tla_service", "torch", "torchvision"}
_MEND = "correct the code; calling the factory with these arguments shows where it fails"
_importing = threading.RLock()


def is_factory(name: str) -> bool:
    """Whether a name has the form ``package.module:factory``."""
    module, _, factory = name.partition(":")
    return factory.isidentifier() and all(part.isidentifier() for part in module.split("."))


def pack(given: str) -> bytes:
    """A folder of code as an archive whose bytes depend on names and contents alone.

    Hidden files and Python's caches are left out. UserError if the folder does not exist, cannot be read, is too large,
    contains a link or a pickle, or hides modules that Python or this package needs.
    """
    with readable(_FIELD, given, "give a folder of files that can be read, with names in UTF-8"):
        return _packed(given)


def _packed(given: str) -> bytes:
    folder = Path(given).expanduser().resolve()
    if not folder.is_dir():
        raise UnavailableError(_FIELD, given, "there is no such folder", "give the folder that contains the module")
    files, size = [], 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix == ".pyc" or any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        if path.is_symlink():
            raise ConfigError(_FIELD, given, f"{name} is a symbolic link", "put a copy in its place")
        if not path.is_file():
            continue
        size += path.stat().st_size
        if size > _MOST_BYTES:
            reason = f"its files are larger than {_MOST_BYTES // 10**6} MB together"
            raise ConfigError(_FIELD, given, reason, "give a folder with only the network's code")
        if is_pickle(path):
            reason = f"{name} is or contains a pickle, which could run arbitrary code when loaded"
            raise ConfigError(_FIELD, given, reason, "remove it; initial weights go into model.pretrained")
        files.append((name, path))
    hidden = {name.parts[0].removesuffix(".py") for name, _ in files if name.suffix == ".py"}
    clash = next(iter(sorted(hidden & (_OURS | sys.stdlib_module_names))), None)
    if clash is not None:
        raise ConfigError(_FIELD, given, f"its module {clash} hides another one of this name", "rename it")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:  # without compression, which differs between versions of zlib
        for name, path in files:
            packed.writestr(zipfile.ZipInfo(name.as_posix()), path.read_bytes())
    return archive.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    """Write the files of an archive to a folder."""
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        packed.extractall(folder)


def call_factory(name: str, num_classes: int, image_shape: ImageShape, code: bytes | None) -> nn.Module:
    """Import and call a factory; UnavailableError for what is not there, ConfigError for what is wrong."""
    module_name = name.partition(":")[0]
    with contextlib.nullcontext() if code is None else _modules_of(code) as folder:
        factory = _function("model.name", name, folder)
        module = importlib.import_module(module_name)
        if folder is not None and not str(module.__file__).startswith(f"{folder}/"):
            remedy = "set model.code to the folder that contains it, or leave it out"
            raise UnavailableError("model.name", name, f"the module {module_name} is not in model.code", remedy)
        try:
            network = factory(num_classes, image_shape)
        except (Exception, SystemExit) as error:
            raise ConfigError("model.name", name, f"the factory failed: {where(error)}", _MEND) from error
    if not isinstance(network, nn.Module):
        reason = f"the factory returned {type(network).__name__}, not a torch.nn.Module"
        raise ConfigError("model.name", name, reason, "return the network")
    if not any(parameter.is_floating_point() for parameter in network.parameters()):
        raise ConfigError("model.name", name, "the network has no parameters to train", "return a network that has")
    return network


def load_function(field: str, name: str, code: bytes | None = None) -> Callable[..., Any]:
    """Import a function ``package.module:function``; UserError, naming the setting `field`, where that fails."""
    with contextlib.nullcontext() if code is None else _modules_of(code) as folder:
        return _function(field, name, folder)


def _function(field: str, name: str, folder: Path | None) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything
        _refuse_import(field, name, module_name, folder, error)
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        remedy = "define it, or correct the name"
        if field == "model.name":
            remedy = "define it as factory(num_classes, image_shape), which returns the network"
        raise ConfigError(field, name, f"{module_name} has no function {function_name}", remedy)
    return function


def distribution(name: str) -> str:
    """The installed distribution that has a factory's module, pinned: ``NAME==VERSION``; ConfigError if none has."""
    package = name.partition(":")[0].partition(".")[0]
    for found in importlib.metadata.packages_distributions().get(package, ()):
        # An editable or local installation cannot be had from an index.
        if importlib.metadata.distribution(found).read_text("direct_url.json") is None:
            return f"{found}=={importlib.metadata.version(found)}"
    reason = f"{package} was not installed from a package index, so others could not load the network"
    raise ConfigError("model.name", name, reason, "set model.code to the folder that contains it")


def code_requirements(archive: bytes) -> list[str]:
    """Lines of ``requirements.txt`` in the code; ConfigError for one that names no package."""
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        text = packed.read(REQUIREMENTS).decode(errors="replace") if REQUIREMENTS in packed.namelist() else ""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    wrong = next((line for line in lines if not re.match(r"[A-Za-z0-9][\w.-]*\s*(\[|[<>=!~;@]|$)", line)), None)
    if wrong is not None:
        remedy = "write one package per line, such as einops==0.8.1"
        raise ConfigError(_FIELD, None, f"the line {wrong!r} of {REQUIREMENTS} is no requirement of a package", remedy)
    return lines


@functools.cache
def _unpacked(archive: bytes) -> Path:
    """A temporary folder with an archive's files, which lasts as long as the process: tracebacks show its lines."""
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    unpack(archive, Path(folder))
    return Path(folder)


@contextlib.contextmanager
def _modules_of(code: bytes) -> Iterator[Path]:
    """Import from the code's folder, which is yielded, inside the block only.

    Its modules are forgotten afterwards, so that two folders with modules of the same names do not mix. cloudpickle
    then sends their classes by value: tasks on other nodes need no copy of the code.
    """
    folder = _unpacked(code)
    own = {path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.rglob("*.py")}

    def take_out() -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}

    with _importing:
        others, writes_caches = take_out(), sys.dont_write_bytecode
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        importlib.invalidate_caches()
        try:
            yield folder
        finally:
            sys.path.remove(str(folder))
            sys.dont_write_bytecode = writes_caches
            take_out()
            sys.modules.update(others)


def _refuse_import(field: str, name: str, module: str, folder: Path | None, error: BaseException) -> NoReturn:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if module == error.name or module.startswith(f"{error.name}."):
            missing = "is not installed" if folder is None else "is not in the folder model.code"
            remedy = "set model.code to the folder that contains it"
            raise UnavailableError(field, name, f"the module {error.name} {missing}", remedy) from error
        remedy = "install its package, or put the module into model.code"
        raise UnavailableError(field, name, f"it imports {error.name}, which is not there", remedy) from error
    raise ConfigError(field, name, f"does not import: {where(error)}", "correct the code") from error


def where(error: BaseException) -> str:
    """An error in one line, with the last line of `model.code` that it came through."""
    text = f"{type(error).__name__}: {one_line(error)}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        _, is_own, path = frame.filename.partition(f"/{_PREFIX}")
        if is_own:
            return f"{text} ({path.partition('/')[2]}, line {frame.lineno})"
    return text
