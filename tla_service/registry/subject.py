"""A model to evaluate: its network, what it says of itself, and where its figures are to be logged."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors.numpy import load_file

from tla_service.config import RunConfig
from tla_service.config.yaml_files import read_yaml
from tla_service.errors import ConfigError, UnavailableError, one_line
from tla_service.inference.detector import Rejector
from tla_service.registry.loading import load_with_folder
from tla_service.report.schema import ModelFacts, ThreatModel
from tla_service.tracking.connection import client

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        facts: Which it is.
        network: In eval mode, on the CPU.
        normalization: Input normalisation inside it.
        image_shape: (C, H, W) that it takes.
        class_names: In label order.
        norm: Norm that it was trained for.
        epsilon: Radius that it was trained for.
        config: The run that trained it; None where it is not known.
        trained_on: Fingerprint of the data it was trained on; None where it is not known.
        rejector: The detector it ships with; None where it has none.
    """

    facts: ModelFacts
    network: "torch.nn.Module"
    normalization: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    norm: Literal["linf", "l2"]
    epsilon: float
    config: RunConfig | None
    trained_on: str | None
    rejector: Rejector | None = None

    @property
    def key(self) -> str:
        """What tells it from other models: the first digits of the weights' SHA-256."""
        return self.facts.weights_sha256[:12]


def load_subject(uri: str, field: str, tracking: str) -> Subject:
    """Load a model with what is known of it.

    Args:
        uri: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, ``models:/m-...``, ``runs:/RUN/model``, a packaged
            model's folder or a checkpoint folder.
        field: Setting that named it, for messages.
        tracking: Tracking store.

    Raises:
        ConfigError: The address cannot be one.
        UnavailableError: There is no such model, it was changed, or the server is away.
    """
    try:
        network, folder = load_with_folder(uri, tracking)
    except (ConfigError, UnavailableError) as error:
        raise type(error)(field, uri, error.reason, error.remedy) from error
    if (folder / "best.safetensors").is_file():
        return _of_checkpoint(uri, folder, network)
    return _of_package(uri, folder, network, tracking)


def _of_checkpoint(uri: str, folder: Path, network: "torch.nn.Module") -> Subject:
    config = RunConfig.model_validate(_yaml(folder / "config.yaml"))
    data = _yaml(folder / "data.json")
    facts = ModelFacts(
        uri=uri,
        weights_sha256=hashlib.sha256((folder / "best.safetensors").read_bytes()).hexdigest(),
        architecture=config.model.name,
        method=config.method,
        seed=config.seed,
        trained_for=ThreatModel(norm=config.attack.norm, epsilon=config.attack.epsilon),
    )
    return Subject(
        facts=facts,
        network=network,
        normalization=config.model.normalization,
        image_shape=tuple(data["image_shape"]),
        class_names=tuple(data["class_names"]),
        norm=config.attack.norm,
        epsilon=config.attack.epsilon,
        config=config,
        trained_on=data.get("fingerprint"),
    )


def _of_package(uri: str, folder: Path, network: "torch.nn.Module", tracking: str) -> Subject:
    inner = folder / "artifacts" if (folder / "artifacts").is_dir() else folder
    described = _yaml(inner / "model.json")
    logged = folder / "MLmodel"
    run_id = _yaml(logged).get("run_id") if logged.is_file() else None
    in_registry = uri.startswith(("models:/", "runs:/"))
    config = _run_config(tracking, run_id) if run_id and in_registry else None
    name, version = _version(uri, tracking)
    facts = ModelFacts(
        uri=uri,
        name=name,
        version=version,
        run_id=run_id if in_registry else None,
        weights_sha256=described["weights"]["sha256"],
        architecture=described["architecture"],
        method=described["method"],
        seed=config.seed if config is not None else None,
        trained_for=ThreatModel.model_validate(described["threat_model"]),
    )
    return Subject(
        facts=facts,
        network=network,
        normalization=described["normalization"],
        image_shape=tuple(described["image_shape"]),
        class_names=tuple(described["class_names"]),
        norm=described["threat_model"]["norm"],
        epsilon=described["threat_model"]["epsilon"],
        config=config,
        trained_on=described.get("facts", {}).get("data_fingerprint"),
        rejector=_rejector(inner, described),
    )


def _rejector(folder: Path, described: dict[str, Any]) -> Rejector | None:
    """The detector in a packaged model; its file was compared with its digest when the package was opened."""
    facts = described.get("detector")
    return None if facts is None else Rejector.from_arrays(load_file(folder / facts["file"]))


def _version(uri: str, tracking: str) -> tuple[str | None, str | None]:
    """Registered name and version that an address names now, an alias resolved."""
    rest = uri.removeprefix("models:/")
    if rest == uri or rest.startswith("m-"):
        return None, None
    if "@" in rest:
        name, _, alias = rest.rpartition("@")
        return name, str(client(tracking).get_model_version_by_alias(name, alias).version)
    name, _, version = rest.rpartition("/")
    return name, version


def _run_config(tracking: str, run_id: str) -> RunConfig | None:
    """The configuration that is stored with a run; None where there is none."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = client(tracking).download_artifacts(run_id, "config.yaml", scratch)
        except (MlflowException, OSError):
            return None
        try:
            return RunConfig.model_validate(_yaml(Path(path)))
        except ValueError as error:
            reason = f"the configuration of its run {run_id} cannot be read ({one_line(error)})"
            remedy = "install the version of tla-service that trained it"
            raise ConfigError("model", None, reason, remedy) from error


def _yaml(path: Path) -> dict[str, Any]:
    """A YAML file, or JSON, which is YAML too."""
    return dict(read_yaml(path, "model"))
