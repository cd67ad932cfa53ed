"""A model under evaluation, and how one is read from a checkpoint folder."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tla_service.config import RunConfig
from tla_service.config.yaml_files import read_yaml
from tla_service.errors import ConfigError, UnavailableError, one_line, readable
from tla_service.files import expanded
from tla_service.inference.detector import Rejector
from tla_service.models import Architecture, ImageClassifier
from tla_service.report.schema import ModelFacts, ThreatModel
from tla_service.training.checkpoint import CODE, MANIFEST, find_damage

WEIGHTS, _CONFIG, _DATA = "best.safetensors", "config.yaml", "data.json"


@dataclass(frozen=True)
class Subject:
    """A model under evaluation: its network, on the CPU, in eval mode, and what is known of it."""

    facts: ModelFacts
    architecture: Architecture
    network: ImageClassifier
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    config: RunConfig | None
    trained_on: str | None
    rejector: Rejector | None = None
    stored: Callable[[str], Mapping[str, Tensor]] | None = None
    """Tensors of a file of the last checkpoint of its training; UserError if there is none."""

    @property
    def key(self) -> str:
        """Identifies the weights: the first digits of their SHA-256."""
        return self.facts.weights_sha256[:12]


# Loads the model at an address; the second argument is the setting that named it, for messages.
LoadSubject = Callable[[str, str], Subject]


def load_checkpoint_subject(address: str, field: str) -> Subject:
    """As :func:`read_checkpoint`, where addresses of MLflow are not used (ConfigError)."""
    if address.startswith(("models:", "runs:")):
        remedy = "give a checkpoint folder, or use jobs/evaluate_tla.py"
        raise ConfigError(field, address, "an address of MLflow, which is not used here", remedy)
    return read_checkpoint(expanded(field, address), address, field)


def read_checkpoint(folder: Path, address: str, field: str) -> Subject:
    """Load the best weights of a checkpoint folder that training wrote; `field` is the setting that named its address.

    UnavailableError if the folder is incomplete or the weights do not fit.
    """
    if not (folder / WEIGHTS).is_file():
        reason = f"holds no {WEIGHTS}" if folder.is_dir() else "there is no such folder"
        raise UnavailableError(field, address, reason, "give a checkpoint folder, such as runs/NAME/checkpoints/LAST")
    missing = [name for name in (_CONFIG, _DATA) if not (folder / name).is_file()]
    if missing:
        reason = f"the checkpoint is incomplete: {missing[0]} is missing"
        raise UnavailableError(field, address, reason, "give another checkpoint")
    code = folder / CODE
    if (folder / MANIFEST).exists():
        damage = find_damage(folder, only=(WEIGHTS, _CONFIG, _DATA, *([CODE] if code.exists() else [])))
        if damage:
            raise UnavailableError(field, address, f"the checkpoint is damaged: {damage}", "give another checkpoint")
    with readable(field, address, "give another checkpoint"):
        config = RunConfig.model_validate(read_yaml(folder / _CONFIG, field))
        data: dict[str, Any] = json.loads((folder / _DATA).read_text(encoding="utf-8"))
        weights = (folder / WEIGHTS).read_bytes()
        channels, height, width = data["image_shape"]
        architecture = Architecture.of(config.model, code.read_bytes() if code.exists() else None)
        network = architecture.build(len(data["class_names"]), (channels, height, width))
    try:
        network.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        reason = f"the weights are not those of {config.model.name} ({one_line(error)})"
        raise UnavailableError(field, address, reason, "choose other weights") from error
    facts = ModelFacts(
        uri=address,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        architecture=config.model.name,
        method=config.method,
        seed=config.seed,
        trained_for=ThreatModel(norm=config.attack.norm, epsilon=config.attack.epsilon),
    )
    return Subject(
        facts=facts,
        architecture=architecture,
        network=network.eval(),
        image_shape=(channels, height, width),
        class_names=tuple(data["class_names"]),
        config=config,
        trained_on=data.get("fingerprint"),
        stored=partial(read_stored, folder),
    )


def read_stored(folder: Path, name: str) -> Mapping[str, Tensor]:
    """Tensors of a file of a checkpoint folder; UnavailableError if it is missing or damaged."""
    try:
        return load((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise UnavailableError("checkpoint", folder, f"keeps no {name}", "use the last one of the run") from error
    except (OSError, SafetensorError) as error:
        reason = f"{name} cannot be read ({one_line(error)})"
        raise UnavailableError("checkpoint", folder, reason, "use another checkpoint") from error
