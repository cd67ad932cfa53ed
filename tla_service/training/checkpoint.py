"""Everything needed to go on exactly where a run stopped, verified by checksum.

A folder holds the current and the best weights, so that the newest checkpoint alone can finish a run. Random draws are
functions of (seed, epoch, step, rank), so the position stands in for the state of every generator.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tla_service.config import RunConfig
from tla_service.config_loading import to_yaml
from tla_service.errors import ConfigError, UnavailableError

MANIFEST = "manifest.json"


@dataclass
class TrainingState:
    """What changes during a run.

    Attributes:
        network: The trained network.
        optimizer: Its optimiser.
        average: Moving average of the weights, if the run keeps one.
        step: Optimiser steps done; epoch and offset follow from it, and so does every random draw.
        partial_totals: Sums of the epoch begun, over all workers (see `step.TOTALS`).
        best_weights: State dict of the best weights so far, on the CPU; empty before the first validation.
        best: Metrics of the epoch they come from.
        history: Metrics of each epoch done.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None = None
    step: int = 0
    partial_totals: list[float] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the average, where there is one."""
        return self.average.module if self.average is not None else self.network


def cpu_weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU, in plain memory layout."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}


def save_checkpoint(folder: Path, state: TrainingState, config: RunConfig, data_facts: Mapping[str, Any]) -> None:
    """Write a checkpoint; the folder appears whole or not at all.

    Args:
        folder: Where to write; replaced if it is there.
        state: What to save.
        config: The run, saved beside the weights.
        data_facts: Class names and image shape, which a loader needs to rebuild the network, and the fingerprint.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(cpu_weights(state.network), partial / "model.safetensors")
        if state.best_weights:
            save_file(state.best_weights, partial / "best.safetensors")
        if state.average is not None:
            save_file(cpu_weights(state.average), partial / "average.safetensors")
        torch.save(state.optimizer.state_dict(), partial / "optimizer.pt")
        position = {name: getattr(state, name) for name in ("step", "partial_totals", "best", "history")}
        (partial / "state.json").write_text(json.dumps({"config_digest": config.digest, **position}))
        (partial / "config.yaml").write_text(to_yaml(config))
        (partial / "data.json").write_text(json.dumps(dict(data_facts)))
        checksums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(checksums, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(folder: Path, state: TrainingState, config: RunConfig, data_facts: Mapping[str, Any]) -> None:
    """Put a saved state back, in place.

    Args:
        folder: The checkpoint.
        state: Network, optimiser and average of the same kind; filled in.
        config: The run.
        data_facts: As for `save_checkpoint`.

    Raises:
        UnavailableError: A file is missing or does not have the content that was written.
        ConfigError: The checkpoint is of a run with another configuration, or on other data.
    """
    verify_checkpoint(folder)
    saved = json.loads((folder / "state.json").read_text())
    if saved["config_digest"] != config.digest:
        raise ConfigError(
            "name",
            config.run_name,
            f"has checkpoints of another configuration ({folder / 'config.yaml'} differs)",
            "choose another --name, or start from that config.yaml",
        )
    if json.loads((folder / "data.json").read_text()) != dict(data_facts):
        reason = "the data set is not the one that this run began with"
        raise ConfigError("data.root", config.data.root, reason, "bring the data back, or choose another --name")
    device = next(state.network.parameters()).device
    state.network.load_state_dict(load_file(folder / "model.safetensors"))
    if state.average is not None:
        state.average.load_state_dict(load_file(folder / "average.safetensors"))
    state.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
    if (folder / "best.safetensors").exists():
        state.best_weights = load_file(folder / "best.safetensors")
    state.step, state.partial_totals = saved["step"], saved["partial_totals"]
    state.best, state.history = saved["best"], saved["history"]


def read_history(folder: Path) -> list[dict[str, float]]:
    """Metrics of each epoch that was done by a checkpoint; none of a damaged one, which `load_checkpoint` refuses."""
    try:
        history: list[dict[str, float]] = json.loads((folder / "state.json").read_text())["history"]
    except (OSError, ValueError, KeyError):
        return []
    return history


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the checksum it was written with.

    Raises:
        UnavailableError: One is missing or differs.
    """
    remedy = "put the file back, or train under another --name, if need be from the weights of another checkpoint"
    try:
        checksums = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UnavailableError("checkpoint", folder, f"no readable {MANIFEST} in it", remedy) from error
    for name, expected in checksums.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise UnavailableError("checkpoint", path, "missing or not what was written (checksum differs)", remedy)


def keep_best_only(folder: Path) -> None:
    """Drop what only a run that goes on needs: the rest is enough to load the best weights."""
    kept = ("best.safetensors", "config.yaml", "data.json")
    checksums = json.loads((folder / MANIFEST).read_text())
    partial = folder / f".{MANIFEST}"
    partial.write_text(json.dumps({name: value for name, value in checksums.items() if name in kept}, indent=1))
    partial.replace(folder / MANIFEST)
    for path in folder.iterdir():
        if path.name not in (*kept, MANIFEST):
            path.unlink()


def read_weights(folder: str) -> dict[str, Tensor]:
    """The best weights of a checkpoint folder, on the CPU.

    Raises:
        UnavailableError: There are none, or a file is damaged.
    """
    path = Path(folder).expanduser() / "best.safetensors"
    if not path.is_file():
        raise UnavailableError("model.weights", folder, "no best.safetensors in it", "give a checkpoint folder")
    verify_checkpoint(path.parent)
    return load_file(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
