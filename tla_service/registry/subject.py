"""A model to evaluate by its address in MLflow, or in a folder."""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mlflow.exceptions import MlflowException
from safetensors.numpy import load_file
from torch import Tensor, nn

from tla_service.config import RunConfig
from tla_service.config.yaml_files import read_yaml
from tla_service.errors import ConfigError, UnavailableError, one_line, readable
from tla_service.inference.detector import Rejector
from tla_service.registry.loading import load_with_folder, pin_version
from tla_service.report.schema import ModelFacts, ThreatModel
from tla_service.report.subjects import WEIGHTS, Subject, load_checkpoint_subject, read_stored
from tla_service.tracking.connection import client, retrying


def load_subject(uri: str, field: str, tracking: str) -> Subject:
    """Load a model with what is known of it; addresses and errors as for `load_model`, about the setting `field`."""
    if (Path(uri).expanduser() / WEIGHTS).is_file():
        return load_checkpoint_subject(uri, field)
    try:
        network, folder = load_with_folder(uri, tracking)
    except (ConfigError, UnavailableError) as error:
        raise type(error)(field, uri, error.reason, error.remedy) from error
    with readable(field, uri, "load another version"):
        return _described(uri, tracking, network, folder)


def _described(uri: str, tracking: str, network: nn.Module, folder: Path) -> Subject:
    """A loaded model with what its folder and its run tell of it."""
    inner = folder / "artifacts" if (folder / "artifacts").is_dir() else folder
    described = read_yaml(inner / "model.json", "model")  # JSON is YAML
    run_id = config = name = version = None
    if uri.startswith(("models:/", "runs:/")):
        run_id = read_yaml(folder / "MLmodel", "model").get("run_id")
        config = _run_config(tracking, run_id) if run_id else None
    if uri.startswith("models:/") and not uri.startswith("models:/m-"):
        # Registered name and version that an alias names now.
        name, _, version = pin_version(uri, tracking).removeprefix("models:/").rpartition("/")
    facts = ModelFacts(
        uri=uri,
        name=name,
        version=version,
        run_id=run_id,
        weights_sha256=described["weights"]["sha256"],
        architecture=described["architecture"],
        method=described["method"],
        seed=config.seed if config is not None else None,
        trained_for=ThreatModel.model_validate(described["threat_model"]),
    )
    detector = described.get("detector")
    return Subject(
        facts=facts,
        network=network,
        image_shape=tuple(described["image_shape"]),
        class_names=tuple(described["class_names"]),
        config=config,
        trained_on=described.get("facts", {}).get("data_fingerprint"),
        stored=None if run_id is None else partial(_stored, tracking, run_id),
        rejector=None if detector is None else Rejector.from_arrays(load_file(inner / detector["file"])),
    )


def _stored(tracking: str, run_id: str, name: str) -> Mapping[str, Tensor]:
    """Tensors of a file of the checkpoint that is stored with a run; UnavailableError if there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            fetch = partial(client(tracking).download_artifacts, run_id, f"checkpoint/{name}", scratch)
            path = Path(retrying("Fetching the checkpoint", fetch))
        except Exception as error:  # each kind of store raises its own
            reason = f"its run {run_id} keeps no checkpoint/{name} ({one_line(error)})"
            raise UnavailableError("checkpoint", run_id, reason, "evaluate the checkpoint folder") from error
        return read_stored(path.parent, path.name)


def _run_config(tracking: str, run_id: str) -> RunConfig | None:
    """The configuration that is stored with a run, if any."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = client(tracking).download_artifacts(run_id, "config.yaml", scratch)
        except (MlflowException, OSError):
            return None
        try:
            return RunConfig.model_validate(read_yaml(Path(path), "model"))
        except ValueError as error:
            reason = f"the configuration of its run {run_id} cannot be read ({one_line(error)})"
            remedy = "install the version of tla-service that trained it"
            raise ConfigError("model", None, reason, remedy) from error
