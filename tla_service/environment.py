"""Code version and installed packages, on which a result depends besides its configuration."""

import getpass
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import tla_service

_GIT_TIMEOUT_SECONDS = 10


def code_version() -> dict[str, str]:
    """Tags with the package version and, in a git checkout, the commit and whether it has local changes."""
    tags = {"tla.version": tla_service.__version__}
    commit = _git("rev-parse", "HEAD")
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        tags["tla.git_dirty"] = str(bool(changed)).lower()
    else:
        commit = os.environ.get("GIT_COMMIT")  # set when the image is built
    if commit:
        tags |= {"tla.git_commit": commit, "mlflow.source.git.commit": commit}
    tags["mlflow.source.name"] = Path(sys.argv[0]).name or "python"
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):
        # A container may run with a user id without a name.
        tags["mlflow.user"] = str(os.getuid())
    return tags


def code_facts() -> dict[str, str]:
    """Version and, in a git checkout, commit, for reports."""
    tags = code_version()
    changed = " with changes" if tags.get("tla.git_dirty") == "true" else ""
    facts = {"version": tags["tla.version"]}
    return facts | ({"commit": tags["tla.git_commit"][:12] + changed} if "tla.git_commit" in tags else {})


def environment() -> dict[str, Any]:
    """Python, machine, CUDA and every installed package with its version, as plain JSON."""
    packages = {
        str(found.metadata["Name"]): found.version
        for found in importlib.metadata.distributions()
        if found.metadata["Name"]
    }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch": packages.get("torch"),
        "ray": packages.get("ray"),
        "cuda": _torch_cuda(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _torch_cuda() -> str | None:
    """The CUDA version of torch; querying devices would create a GPU context in the driver."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def _git(*arguments: str) -> str | None:
    """Output of a git command in this package's folder; None without git or outside a checkout."""
    folder = Path(tla_service.__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
