"""Everything needed to go on exactly where a run stopped, verified by checksum.

A folder holds the current and the best weights, so that the newest checkpoint alone can finish a run. Random draws are
functions of (seed, epoch, step, rank), so the position stands in for the state of every generator.
"""

import hashlib
import io
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tla_service.config import RunConfig
from tla_service.config.loading import same_run, to_yaml
from tla_service.data.cache import disk_trouble
from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import whole_folder, write_whole
from tla_service.training.average import WeightAverage

MANIFEST = "manifest.json"
RESUMABLE = ("model.safetensors", "optimizer.pt", "state.json", "config.yaml", "data.json")


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
    average: WeightAverage | None = None
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
    """Write a checkpoint; the folder appears whole or not at all, on the file system it belongs to.

    Args:
        folder: Where to write; replaced if it is there.
        state: What to save.
        config: The run, saved beside the weights.
        data_facts: Class names and image shape, which a loader needs to rebuild the network, and fingerprints.

    Raises:
        UnavailableError: The disk is full, or cannot be written for another reason.
    """
    remedy = "free some space and give the same command again: the run resumes from the checkpoint before"
    with disk_trouble("checkpoint", folder, remedy), whole_folder(folder) as partial:
        save_file(cpu_weights(state.network), partial / "model.safetensors")
        if state.best_weights:
            save_file(state.best_weights, partial / "best.safetensors")
        if state.average is not None:
            save_file(cpu_weights(state.average), partial / "average.safetensors")
        optimizer = io.BytesIO()  # written to a file that fails, torch.save hides why
        torch.save(state.optimizer.state_dict(), optimizer)
        (partial / "optimizer.pt").write_bytes(optimizer.getbuffer())
        position = {name: getattr(state, name) for name in ("step", "partial_totals", "best", "history")}
        (partial / "state.json").write_text(json.dumps({"config_digest": config.digest, **position}))
        (partial / "config.yaml").write_text(to_yaml(config))
        (partial / "data.json").write_text(json.dumps(dict(data_facts)))
        checksums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(checksums, indent=1))


def load_checkpoint(folder: Path, state: TrainingState, config: RunConfig, data_facts: Mapping[str, Any]) -> None:
    """Put a saved state back, in place.

    Args:
        folder: The checkpoint, verified.
        state: Network, optimiser and average of the same kind; filled in.
        config: The run.
        data_facts: As for `save_checkpoint`.

    Raises:
        ConfigError: The checkpoint is of a run with another configuration, or on other data.
    """
    saved = json.loads((folder / "state.json").read_text())
    # The digest of an earlier version may count other settings.
    if saved["config_digest"] != config.digest and not same_run((folder / "config.yaml").read_text(), config):
        raise ConfigError(
            "name",
            config.run_name,
            f"has checkpoints of another configuration ({folder / 'config.yaml'} differs)",
            "choose another --name, or start from that config.yaml",
        )
    if not _same_training_data(json.loads((folder / "data.json").read_text()), data_facts):
        reason = "the data set is not the one that this run began with"
        raise ConfigError("data.root", config.data.root, reason, "bring the data back, or choose another --name")
    device = next(state.network.parameters()).device
    state.network.load_state_dict(load_file(folder / "model.safetensors"))
    if state.average is not None:
        state.average.load_state_dict(load_file(folder / "average.safetensors"))
    optimizer = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
    # This run's own options: how it computes the same update (`speed`) may have changed since.
    for group, own in zip(optimizer["param_groups"], state.optimizer.param_groups, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
    state.optimizer.load_state_dict(optimizer)
    # A fused step walks through memory: each tensor of the state must lie as its parameter does.
    for parameter, tensors in state.optimizer.state.items():
        for name, value in tensors.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                tensors[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    best = folder / "best.safetensors"
    state.best_weights = load_file(best) if best.exists() else {}
    state.step, state.partial_totals = saved["step"], saved["partial_totals"]
    state.best, state.history = saved["best"], saved["history"]


def _same_training_data(saved: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether a run may resume: test images shape no weights, but older checkpoints have one fingerprint of all."""
    left_out = "fingerprint" if "training_fingerprint" in saved else "training_fingerprint"
    before, now = ({key: facts[key] for key in facts if key != left_out} for facts in (saved, present))
    return before == now


def find_damage(folder: Path, required: Collection[str] = ()) -> str:
    """What is wrong with a checkpoint: every file is compared with the checksum it was written with.

    Args:
        folder: The checkpoint.
        required: Names of files that it must have; `RESUMABLE` for one that a run is to resume from.

    Returns:
        The file and what is wrong with it; empty for a checkpoint that is whole.
    """
    try:
        checksums = dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return f"{MANIFEST} is missing or cannot be read"
    for name in {**dict.fromkeys(required), **checksums}:
        try:
            if name not in checksums:
                return f"{name} is missing from {MANIFEST}"
            if _sha256(folder / name) != checksums[name]:
                return f"{name} is corrupted (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({(error.strerror or str(error)).lower()})"
    return ""


def verify_checkpoint(folder: Path) -> None:
    """Check that a checkpoint is whole.

    Raises:
        UnavailableError: A file is missing or differs from what was written.
    """
    damage = find_damage(folder)
    if damage:
        remedy = "put the file back, or use another checkpoint"
        raise UnavailableError("checkpoint", folder, damage, remedy)


def keep_best_only(folder: Path) -> None:
    """Drop what only a run that goes on needs: the rest is enough to load the best weights."""
    kept = ("best.safetensors", "config.yaml", "data.json")
    checksums = json.loads((folder / MANIFEST).read_text())
    write_whole(
        folder / MANIFEST, json.dumps({name: value for name, value in checksums.items() if name in kept}, indent=1)
    )
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
