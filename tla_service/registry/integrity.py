"""Verifies that a packaged model is unmodified, by a manifest of its files with their digests."""

import hashlib
import json
import marshal
from importlib.util import MAGIC_NUMBER
from pathlib import Path

from tla_service.errors import UnavailableError
from tla_service.files import sha256

MANIFEST = "manifest.json"
_ADDED_BY_MLFLOW = {"registered_model_meta"}  # written beside a version that MLflow itself downloads
_CACHE_HEADER = 16  # bytes before the code in a .pyc file


def write_manifest(folder: Path) -> str:
    """Write ``manifest.json``, the SHA-256 of every file of a packaged model; returns the manifest's own SHA-256."""
    digests = {name: sha256(path) for name, path in _files(folder).items() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1, sort_keys=True), encoding="utf-8")
    return sha256(folder / MANIFEST)


def verify_package(folder: Path, name: str, expected: str | None) -> None:
    """Raise `UnavailableError` unless a folder contains exactly the files that were packaged.

    `expected` is the SHA-256 of the manifest in the registry; None without a registry: the manifest is trusted then.
    `name` is the package's address, for messages.
    """

    def bad(reason: str, remedy: str = "load another version") -> UnavailableError:
        return UnavailableError("model", name, reason, remedy)

    try:
        # Reading a pipe or a device might never end.
        manifest = (folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else b""
        digests = {str(file): str(digest) for file, digest in dict(json.loads(manifest)).items()}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = f"contains no readable {MANIFEST}, so it was not packaged by this project"
        raise bad(reason, "give a packaged model, or, to load or evaluate one, a checkpoint folder") from error
    if expected is not None and hashlib.sha256(manifest).hexdigest() != expected:
        raise bad(f"{MANIFEST} was modified: its SHA-256 is not {expected[:12]}... as in the registry")
    present = _files(folder)
    for file in sorted(set(present) - set(digests) - {MANIFEST} - _ADDED_BY_MLFLOW):
        if not _is_cache(present[file]):
            raise bad(f"contains a file that was not packaged ({file})")
    for file, digest in digests.items():
        if file not in present:
            raise bad(f"{file} is missing")
        whole = present[file].is_file() and not present[file].is_symlink()
        if not whole or sha256(present[file]) != digest:
            raise bad(f"{file} was modified: its SHA-256 is not {digest[:12]}...")


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(folder)): path for path in paths}


def _is_cache(path: Path) -> bool:
    """Whether a file is what Python compiles from the source beside it: a planted one would run instead of it."""
    source = path.parent.parent / f"{path.name.partition('.')[0]}.py"
    if path.parent.name != "__pycache__" or path.suffix != ".pyc" or path.is_symlink() or not source.is_file():
        return False
    content = path.read_bytes()
    if content[: len(MAGIC_NUMBER)] != MAGIC_NUMBER:
        return False
    try:
        found = marshal.loads(content[_CACHE_HEADER:])  # does not execute it
        return bool(found == compile(source.read_bytes(), found.co_filename, "exec", dont_inherit=True))
    except (ValueError, EOFError, TypeError, AttributeError, SyntaxError):
        return False
