"""Finds pickles, which can run arbitrary code when they are loaded."""

import contextlib
import pickletools
import zipfile
from pathlib import Path

_STARTS = {bytes((0x80, protocol)) for protocol in range(2, 6)}
_SUFFIXES = {".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt", ".bin", ".cloudpickle", ".dill"}
_CALLING = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4"}
_SMALL_BYTES = 10_000_000


def is_pickle(path: Path) -> bool:
    """Whether a file contains a Python pickle, by its name or content: loading one can run arbitrary code."""
    if path.suffix.lower() in _SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(3)
    # The length of a safetensors header may start like a pickle, but continues with 0, which is no opcode.
    if start[:2] in _STARTS and start[2:] != b"\0":
        return True
    if path.stat().st_size <= _SMALL_BYTES and _calls_something(path.read_bytes()):
        return True
    with contextlib.suppress(zipfile.BadZipFile, NotImplementedError), zipfile.ZipFile(path) as archive:
        return any(Path(name).suffix.lower() in _SUFFIXES for name in archive.namelist())
    return False


def _calls_something(content: bytes) -> bool:
    """Whether bytes are entirely a pickle that looks up or calls a name; protocol 0 has no magic number."""
    calls = False
    try:
        for opcode, _, place in pickletools.genops(content):
            calls = calls or opcode.name in _CALLING
            if opcode.name == "STOP":
                return calls and content[(place or 0) + 1 :].strip() == b""
    except Exception:  # noqa: BLE001 - content that is no pickle may raise anything
        return False
    return False
