"""Whether a packaged model is what was packaged: a list of its files with their digests, and no pickle among them."""

import hashlib
import json
import marshal
import pickletools
import zipfile
from importlib.util import MAGIC_NUMBER
from pathlib import Path

from tla_service.errors import UnavailableError

MANIFEST = "manifest.json"
_ADDED_BY_MLFLOW = {"registered_model_meta"}  # written beside a version that MLflow itself downloads
_PICKLE_STARTS = {bytes((0x80, protocol)) for protocol in range(2, 6)}
_PICKLE_SUFFIXES = {".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt", ".bin", ".cloudpickle", ".dill"}
_CALLING = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4"}
_CACHE_HEADER = 16  # bytes before the code in a .pyc file
_SMALL_BYTES = 10_000_000


def find_pickles(folder: Path) -> list[Path]:
    """Files that hold Python pickles, by name or by content: loading one runs whatever code it carries."""
    return [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and _is_pickle(path)]


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> str:
    """List every file of a packaged model with its SHA-256 in ``manifest.json``.

    Returns:
        The SHA-256 of that list: who knows it can tell whether anything was changed.
    """
    digests = {str(path.relative_to(folder)): sha256(path) for path in _files(folder) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1, sort_keys=True), encoding="utf-8")
    return sha256(folder / MANIFEST)


def verify_package(folder: Path, subject: str, name: str, expected: str | None = None) -> None:
    """Make sure that a folder holds what was packaged, all of it and nothing else.

    Args:
        folder: The packaged model.
        subject: What messages call the setting that named it.
        name: Its address, for messages.
        expected: SHA-256 of the list of files, as the registry keeps it; ``None`` where there is no registry: then
            only the list itself vouches for the files.

    Raises:
        UnavailableError: There is no list, a file is missing, changed or new, or one holds a pickle.
    """
    remedy = "load another version"
    try:
        manifest = (folder / MANIFEST).read_bytes()
        digests: dict[str, str] = dict(json.loads(manifest))
    except (OSError, ValueError) as error:
        reason = f"holds no readable {MANIFEST}, so it was not packaged by this project"
        raise UnavailableError(subject, name, reason, "give a model of this project, or a checkpoint folder") from error
    if expected is not None and hashlib.sha256(manifest).hexdigest() != expected:
        reason = f"{MANIFEST} was changed: its SHA-256 is not {expected[:12]}..., which the registry keeps"
        raise UnavailableError(subject, name, reason, remedy)
    pickles = find_pickles(folder)
    if pickles:
        reason = f"holds a pickle file ({pickles[0].relative_to(folder)}), which could run any code"
        raise UnavailableError(subject, name, reason, "load a version without it")
    present = {str(path.relative_to(folder)): path for path in _files(folder)}
    for file in sorted(set(present) - set(digests) - {MANIFEST} - _ADDED_BY_MLFLOW):
        if not _is_cache(present[file]):
            raise UnavailableError(subject, name, f"holds a file that was not packaged ({file})", remedy)
    for file, digest in digests.items():
        if file not in present:
            raise UnavailableError(subject, name, f"{file} is missing", remedy)
        if present[file].is_symlink() or sha256(present[file]) != digest:
            raise UnavailableError(subject, name, f"{file} was changed: its SHA-256 is not {digest[:12]}...", remedy)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _is_cache(path: Path) -> bool:
    """Whether a file is what Python itself makes of a source beside it, when MLflow loads a model where it is stored.

    Compared with the source, since a planted one would run in place of it.
    """
    source = path.parent.parent / f"{path.name.partition('.')[0]}.py"
    if path.parent.name != "__pycache__" or path.suffix != ".pyc" or path.is_symlink() or not source.is_file():
        return False
    content = path.read_bytes()
    if content[: len(MAGIC_NUMBER)] != MAGIC_NUMBER:
        return False
    try:
        found = marshal.loads(content[_CACHE_HEADER:])  # reads, runs nothing
        return bool(found == compile(source.read_bytes(), found.co_filename, "exec", dont_inherit=True))
    except (ValueError, EOFError, TypeError, AttributeError, SyntaxError):
        return False


def _is_pickle(path: Path) -> bool:
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(3)
    # No opcode of a pickle is 0; the length of a safetensors header may start like a pickle, and goes on with 0.
    if start[:2] in _PICKLE_STARTS and start[2:] != b"\0":
        return True
    if path.stat().st_size <= _SMALL_BYTES and _calls_something(path.read_bytes()):
        return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(Path(name).suffix.lower() in _PICKLE_SUFFIXES for name in archive.namelist())
    return False


def _calls_something(content: bytes) -> bool:
    """Whether bytes are, first to last, a pickle that looks up or calls a name: those of protocol 0 have no mark."""
    calls = False
    try:
        for opcode, _, place in pickletools.genops(content):
            calls = calls or opcode.name in _CALLING
            if opcode.name == "STOP":
                return calls and content[(place or 0) + 1 :].strip() == b""
    except Exception:  # noqa: BLE001 - whatever is no pickle ends somewhere in an error
        return False
    return False
