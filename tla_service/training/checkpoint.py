"""Checkpoints: everything needed to resume a run exactly, verified by checksum; the newest is enough to finish it.

Random draws are functions of (seed, epoch, step, rank), so the position replaces the state of every generator.
"""

import contextlib
import io
import json
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tla_service.config import RunConfig
from tla_service.config.loading import same_run, to_yaml
from tla_service.data import Dataset
from tla_service.data.cache import disk_trouble
from tla_service.errors import ConfigError, UnavailableError, readable
from tla_service.files import sha256, whole_folder, write_whole
from tla_service.models import Architecture
from tla_service.runtime import WorkerContext, failing_together, gather_objects, running_statistics
from tla_service.training.average import WeightAverage

MANIFEST = "manifest.json"
_POSITION = ("step", "partial_totals", "best", "history", "workers", "validating")  # of a TrainingState
STATISTICS = "statistics.safetensors"  # of every worker, in a checkpoint within an epoch
VALIDATING = "validating.safetensors"  # of an epoch whose validation was not known yet
CODE = "code.zip"  # of a network from outside this package
RESUMABLE = ("model.safetensors", "optimizer.pt", "state.json", "config.yaml", "data.json")


@dataclass
class TrainingState:
    """What changes during a run."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    step: int = 0  # optimizer steps done; epoch, offset and every random draw follow from it
    partial_totals: list[float] = field(default_factory=list)  # of the current epoch; see `step.TOTALS`
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # state dict on the CPU
    best: dict[str, float] = field(default_factory=dict)  # metrics of their epoch
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each epoch done
    workers: list[list[int]] = field(default_factory=list)  # [step, workers from it on] for each change
    validating: int = -1  # the epoch whose validation another process measures; its state dict, on the CPU
    validating_weights: dict[str, Tensor] = field(default_factory=dict)
    # What `statistics` are to be on this worker, after a checkpoint within an epoch; DDP first makes all alike.
    own_statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate: the average, if there is one."""
        return self.average.module if self.average is not None else self.network

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The `running_statistics` of the network and of the average: each worker has its own."""
        average = {} if self.average is None else {"average": self.average}
        return running_statistics(nn.ModuleDict({"network": self.network, **average}))


def cpu_weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU, in plain memory layout."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    config: RunConfig,
    data_facts: Mapping[str, Any],
    code: bytes | None = None,
    statistics: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Write a checkpoint over an older one.

    `data_facts` have what a loader needs to rebuild the network; `statistics` are every worker's, by rank, where they
    differ.
    """
    remedy = "free some space and give the same command again: the run resumes from the checkpoint before"
    with disk_trouble("checkpoint", folder, remedy), whole_folder(folder) as partial:
        save_file(cpu_weights(state.network), partial / "model.safetensors")
        if state.best_weights:
            save_file(state.best_weights, partial / "best.safetensors")
        if state.validating_weights:
            save_file(state.validating_weights, partial / VALIDATING)
        if state.average is not None:
            save_file(cpu_weights(state.average), partial / "average.safetensors")
        if any(statistics):
            each = ((rank, *pair) for rank, own in enumerate(statistics) for pair in own.items())
            # safetensors takes no channels-last buffers.
            save_file({f"{rank}.{name}": value.contiguous() for rank, name, value in each}, partial / STATISTICS)
        optimizer = io.BytesIO()  # torch.save to a file hides why it fails
        torch.save(state.optimizer.state_dict(), optimizer)
        (partial / "optimizer.pt").write_bytes(optimizer.getbuffer())
        position = {name: getattr(state, name) for name in _POSITION}
        (partial / "state.json").write_text(json.dumps({"config_digest": config.digest, **position}))
        (partial / "config.yaml").write_text(to_yaml(config))
        (partial / "data.json").write_text(json.dumps(dict(data_facts)))
        if code is not None:
            (partial / CODE).write_bytes(code)
        checksums = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(checksums, indent=1))


def load_checkpoint(
    folder: Path, state: TrainingState, config: RunConfig, data_facts: Mapping[str, Any], context: WorkerContext
) -> None:
    """Load a verified checkpoint in place; ConfigError if it is of another configuration, or of other data."""
    saved = json.loads((folder / "state.json").read_text())
    # The digest of an earlier version may count other settings.
    if saved["config_digest"] != config.digest and not same_run((folder / "config.yaml").read_text(), config):
        reason = f"has checkpoints of another configuration ({folder / 'config.yaml'} differs)"
        raise ConfigError(
            "name", config.run_name, reason, "choose another --name or --output, or start from that config.yaml"
        )
    check_facts(json.loads((folder / "data.json").read_text()), data_facts, config)
    device = next(state.network.parameters()).device
    state.network.load_state_dict(load_file(folder / "model.safetensors"))
    if state.average is not None:
        state.average.load_state_dict(load_file(folder / "average.safetensors"))
    optimizer = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
    # This run's own options: how it computes the same update (`speed`) may have changed since.
    for group, own in zip(optimizer["param_groups"], state.optimizer.param_groups, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
    state.optimizer.load_state_dict(optimizer)
    # A fused step needs each tensor of the state in the memory layout of its parameter.
    for parameter, tensors in state.optimizer.state.items():
        for name, value in tensors.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                tensors[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    # By the manifest: an upload that was interrupted may have left other files under the same name.
    there = json.loads((folder / MANIFEST).read_text())
    state.best_weights, state.validating_weights = (
        load_file(folder / name) if name in there else {} for name in ("best.safetensors", VALIDATING)
    )
    for name in saved.keys() & set(_POSITION):  # older versions did not save `workers`
        setattr(state, name, saved[name])
    if STATISTICS in there:
        each = load_file(folder / STATISTICS)
        workers = 1 + max(int(name.partition(".")[0]) for name in each)
        # With another number of workers the mean over all, as at the end of an epoch.
        ranks = [context.rank] if workers == context.world_size else range(workers)
        state.own_statistics = {
            name: torch.stack([each[f"{rank}.{name}"] for rank in ranks]).mean(0) for name in state.statistics
        }


def data_facts(dataset: Dataset, extra: Mapping[str, str], architecture: Architecture) -> dict[str, Any]:
    """What `check_facts` compares, and a loader of the network needs; `extra` are facts on extra images, if any."""
    facts: dict[str, Any] = {
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.image_shape),
        "fingerprint": dataset.fingerprint,
    }
    for name, part in (("training", dataset.train), ("validation", dataset.validation)):
        if part is not None:
            facts |= {f"{name}_fingerprint": part.digest(), f"{name}_files": part.files_digest()}
    if extra:
        facts["extra_fingerprint"] = extra["extra_fingerprint"]
    return facts if architecture.code is None else facts | {"code_sha256": architecture.code_sha256}


def check_alike(facts: Mapping[str, Any], config: RunConfig, context: WorkerContext) -> None:
    """Raise ConfigError on every worker if one has other data or code than rank 0: an old copy on its node, maybe."""
    first = gather_objects(facts, context)[0]
    with failing_together(context):
        try:
            check_facts(first, facts, config)
        except ConfigError as error:
            reason = f"its files on {socket.gethostname()} (rank {context.rank}) differ from those of rank 0"
            raise ConfigError(error.subject, error.value, reason, "give all nodes the same files") from None


def check_facts(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    config: RunConfig,
    what: str = "run",
    flag: str = "--name or --output",
) -> None:
    """Raise ConfigError if a run, or a sweep, began with other data, or with other code of its network."""
    remedy = f"bring them back, or choose another {flag}"
    if saved.get("code_sha256") != now.get("code_sha256"):
        reason = f"its files are not those that this {what} began with"
        raise ConfigError("model.code", config.model.code, reason, remedy)
    if saved.get("extra_fingerprint") != now.get("extra_fingerprint"):
        reason = f"the extra images are not those that this {what} began with"
        raise ConfigError("data.extra.path", config.data.extra.path, reason, remedy)

    def same(part: str) -> bool:
        """Whether images are the same; where one side had them in memory and the other had not, by their files."""
        images, files = f"{part}_fingerprint", f"{part}_files"
        theirs, ours = saved.get(images), now.get(images)
        return theirs == ours or now.get(files, "") == theirs or saved.get(files, "") == ours

    # Older checkpoints have one fingerprint of training and test images together.
    is_whole = saved.get("fingerprint") == now.get("fingerprint")
    is_same = same("training") if "training_fingerprint" in saved else is_whole
    if not is_same or any(saved.get(name) != now.get(name) for name in ("class_names", "image_shape")):
        reason = f"the data set is not the one that this {what} began with"
        raise ConfigError("data.root", config.data.root, reason, f"bring the data back, or choose another {flag}")
    if not same("validation"):
        reason = f"the validation images are not those that this {what} began with"
        remedy = f"name their split again, {remedy}"
        if "validation_fingerprint" not in saved:
            reason = f"this {what} began with validation images that were held out of the training set"
            remedy = f'set it to "", or choose another {flag}'
        raise ConfigError("data.validation", config.data.validation, reason, remedy)


def find_damage(folder: Path, required: Collection[str] = (), only: Collection[str] | None = None) -> str:
    """The first damaged or missing file of a checkpoint, or `only` of these, and what is wrong; empty if intact."""
    try:
        checksums = dict(json.loads((folder / MANIFEST).read_text())) if (folder / MANIFEST).is_file() else None
    except (OSError, ValueError, TypeError, RecursionError):
        checksums = None
    if checksums is None:
        return f"{MANIFEST} is missing or cannot be read"
    for name in {**dict.fromkeys(required), **checksums} if only is None else only:
        try:
            if name not in checksums:
                return f"{name} is missing from {MANIFEST}"
            no_file = (folder / name).exists() and not (folder / name).is_file()  # a pipe or a device might never end
            if no_file or sha256(folder / name) != checksums[name]:
                return f"{name} is corrupted (its checksum differs)"
        except (FileNotFoundError, TypeError, ValueError):  # the latter of names that no file can have
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({(error.strerror or str(error)).lower()})"
    return ""


class Stored(Protocol):
    """A stored checkpoint and its path; `ray.train.Checkpoint` is one."""

    path: str

    def as_directory(self) -> contextlib.AbstractContextManager[str]:
        """A local folder with its files, within the block."""


@dataclass
class LocalCheckpoint:
    """A checkpoint on this machine."""

    path: str

    def as_directory(self) -> contextlib.AbstractContextManager[str]:
        """The folder itself."""
        return contextlib.nullcontext(self.path)


def restore(
    stored: Callable[[], Sequence[Stored]],
    load: Callable[[Path], None],
    context: WorkerContext,
    warn: Callable[[str], None],
) -> str:
    """Load the newest checkpoint that is intact on every worker; all workers call this together.

    `stored` lists them on rank 0, newest first, and `warn` is called there for each that is skipped. Returns the path,
    empty if there is none; raises a UserError if there are some but none can be used, or `load` refuses one.
    """
    with failing_together(context):
        own = stored() if context.is_main else ()
    checkpoints = gather_objects(own, context)[0]
    damages: list[str] = []
    for checkpoint in checkpoints:
        with contextlib.ExitStack() as opened:
            folder, damage = Path(), ""
            with failing_together(context):
                try:
                    folder = Path(opened.enter_context(checkpoint.as_directory()))
                    damage = find_damage(folder, RESUMABLE) if folder.is_dir() else "it is missing"
                except FileNotFoundError:
                    damage = "it is missing"
                except OSError as error:
                    reason = f"cannot be read ({' '.join(str(error).split())[:300]})"
                    raise UnavailableError("checkpoint", checkpoint.path, reason, "check the storage") from error
            damage = next(filter(None, gather_objects(damage, context)), "")
            if not damage:
                with failing_together(context), readable("checkpoint", checkpoint.path, "use another checkpoint"):
                    load(folder)
                return checkpoint.path
        damages.append(damage)
        if context.is_main and len(damages) < len(checkpoints):
            older = checkpoints[len(damages)].path
            warn(f"checkpoint {checkpoint.path} cannot be used ({damage}); falling back to {older}")
    if damages:
        reason = damages[0] + ("; none of the older ones can be used either" if len(damages) > 1 else "")
        remedy = f"restore its files, or delete {Path(checkpoints[0].path).parent} to start over"
        raise UnavailableError("checkpoint", checkpoints[0].path, reason, remedy)
    return ""


def verify_checkpoint(folder: Path) -> None:
    """Raise UnavailableError if a file of a checkpoint is missing or differs from what was written."""
    if damage := find_damage(folder):
        raise UnavailableError("checkpoint", folder, damage, "put the file back, or use another checkpoint")


def keep_best_only(folder: Path) -> None:
    """Remove what only a run that resumes needs: the rest is enough to load the best weights."""
    kept = ("best.safetensors", "config.yaml", "data.json", CODE)
    checksums = {name: value for name, value in json.loads((folder / MANIFEST).read_text()).items() if name in kept}
    write_whole(folder / MANIFEST, json.dumps(checksums, indent=1))
    for path in folder.iterdir():
        if path.name not in (*kept, MANIFEST):
            path.unlink()
