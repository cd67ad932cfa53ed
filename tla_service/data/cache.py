"""The cache of a node: locks between processes, decoded images."""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from tla_service.errors import UnavailableError
from tla_service.files import expanded, remove_parts, whole_file

LOG = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
MAKE_ROOM = "free some space, or give another folder"
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "no permission"),
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP), "the file system has no locks"),
}


@contextlib.contextmanager
def disk_trouble(field: str, folder: Path | str, remedy: str) -> Iterator[None]:
    """Raise UnavailableError, naming the setting ``field``, for any error of the system or safetensors inside."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        # safetensors reports a full disk only in its text.
        reason = _REASONS[errno.ENOSPC] if "os error 28" in str(error) else str(error)
        raise UnavailableError(field, folder, reason, remedy) from error
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise UnavailableError(field, error.filename or folder, reason, remedy) from error


def cache_folder(cache_dir: str, *parts: str) -> Path:
    """Make a folder of the cache; UnavailableError if it cannot be made."""
    with disk_trouble("data.cache_dir", cache_dir, "give a folder that can be written"):
        folder = expanded("data.cache_dir", cache_dir).joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, which the system frees even when the holder is killed."""
    # The file is left behind: removing it would let two processes hold the lock.
    with contextlib.ExitStack() as stack:
        with disk_trouble("data.cache_dir", path, "give a local folder that can be written"):
            handle = stack.enter_context(path.open("a"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                LOG.info("waiting for another process to finish %s", path.with_suffix(""))
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def files_key(paths: Iterable[Path], *settings: object) -> str:
    """A name for what is derived from files: it changes with their paths, sizes, times of change or the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        with disk_trouble("data.root", path, "check the folder"):
            stat = path.stat()
            digest.update(os.fsencode(f"{path.absolute()}\0{stat.st_size}\0{stat.st_ctime_ns}\n"))
    return digest.hexdigest()[:24]


def content_digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of shapes, types and every byte; about 0.7 s per GB."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().data.cast("B") if tensor.numel() else b"")
    return digest.hexdigest()


def cached_tensors(cache_dir: str, key: str, build: Callable[[], Tensors]) -> tuple[Tensors, dict[str, str]]:
    """Tensors built once per node, and their digests, by a key that changes whenever the result of ``build`` would.

    The file is mapped into memory, so the workers of a node share one copy. Treat the tensors as read-only.
    """
    from safetensors.torch import save_file

    path = cache_folder(cache_dir, "decoded") / f"{key}.safetensors"
    if (found := _read_tensors(path)) is not None:
        return found
    with locked(path.with_suffix(".lock")):
        if (found := _read_tensors(path)) is None:
            tensors = build()
            digests = {name: content_digest(tensor) for name, tensor in tensors.items()}
            with disk_trouble("data.cache_dir", path.parent, MAKE_ROOM):
                remove_parts(path.parent, path.name)
                with whole_file(path) as part:
                    save_file(tensors, part, digests)
            # Read back, so that the builder uses the shared mapping, too.
            del tensors
            found = _read_tensors(path)
    if found is None:
        raise UnavailableError("data.cache_dir", path, "cannot be read back after writing", "check the disk")
    return found


def _read_tensors(path: Path) -> tuple[Tensors, dict[str, str]] | None:
    """Map the file; ``None`` if it is missing or unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        LOG.warning("building %s again: %s", path, error)
        return None
