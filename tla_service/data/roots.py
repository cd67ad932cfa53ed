"""``data.root`` as a local path."""

import contextlib
import os
from pathlib import Path

from tla_service.config import DataConfig
from tla_service.data.cache import disk_trouble
from tla_service.data.s3 import SCHEME, Prefix, copy_prefix
from tla_service.errors import ConfigError, UnavailableError


def check_root(root: str | None) -> None:
    """Check within seconds, without copying anything, that a root exists and can be read; ``None`` is fine.

    Raises:
        ConfigError: If it is neither a path nor an s3:// address.
        UnavailableError: If it does not exist or cannot be read.
    """
    if root is not None and root.startswith(SCHEME):
        with contextlib.closing(Prefix(root)) as prefix:
            prefix.check()
    elif root is not None:
        _local(root, create=False)


def required_root(config: DataConfig) -> Path:
    """The local path of ``data.root``: the path itself, or an up-to-date copy of an s3:// prefix in the cache.

    Raises:
        ConfigError: If none is given, or it is neither a path nor an s3:// address.
        UnavailableError: If it does not exist or cannot be read, or the cache cannot be written.
    """
    root = config.root
    if root is None:
        raise ConfigError("data.root", None, f"{config.name} is not embedded", "give a folder, or s3://bucket/prefix")
    return copy_prefix(root, config.cache_dir) if root.startswith(SCHEME) else _local(root, create=config.download)


def _local(root: str, *, create: bool) -> Path:
    if "://" in root:
        raise ConfigError("data.root", root, "only local paths and s3:// can be read", "copy the data to one of them")
    try:
        path = Path(root).expanduser()
    except RuntimeError as error:
        raise UnavailableError("data.root", root, "no home folder", "give an absolute path") from error
    with disk_trouble("data.root", root, "check the path and its permissions"):
        if create:
            path.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            remedy = "check the path; on a cluster, on every node"
            raise UnavailableError("data.root", root, "no such file or folder", remedy)
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UnavailableError("data.root", root, "no permission", "let this user read it")
    return path
