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
    commit = {"commit": tags["tla.git_commit"][:12] + changed} if "tla.git_commit" in tags else {}
    return {"version": tags["tla.version"], **commit}


def environment() -> dict[str, Any]:
    """Python, machine, CUDA and every installed package with its version, as plain JSON."""
    import torch  # not needed by jobs that only ask for the code's version

    found = ((str(package.metadata["Name"] or ""), package.version) for package in importlib.metadata.distributions())
    packages = {name: version for name, version in sorted(found, key=lambda item: item[0].lower()) if name}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch": packages.get("torch"),
        "ray": packages.get("ray"),
        "cuda": torch.version.cuda,  # querying devices would create a GPU context in the driver
        "packages": packages,
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command in this package's folder; None without git or outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
