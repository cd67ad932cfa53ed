"""A network as a model version: weights as safetensors, the code that runs them, and nothing that pickles."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import tla_service
from tla_service.config import RunConfig
from tla_service.errors import ConfigError
from tla_service.registry.connection import client, quiet, retrying
from tla_service.registry.loading import FORMAT_VERSION, find_pickles, load_model
from tla_service.registry.model_card import model_card
from tla_service.registry.tracking import FINGERPRINT, RUN_KEY

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature
    from mlflow.models.model import Model

_SHIPPED = ("__init__.py", "errors.py", "models")
_REQUIREMENTS = ("mlflow", "numpy", "safetensors", "torch", "torchvision")
_ENTRY = Path(__file__).with_name("pyfunc_entry.py")
_EXAMPLE_IMAGES = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A network that MLflow holds.

    Attributes:
        model_uri: ``models:/NAME/VERSION``, or ``models:/m-...`` when it is not registered.
        version: Version in the registry; ``None`` when it is not registered.
        model_id: MLflow's id of the logged model.
        digest: SHA-256 of the weights file, 64 hex digits.
    """

    model_uri: str
    version: str | None
    model_id: str
    digest: str


def log_model(
    uri: str,
    run_id: str,
    *,
    state_dict: Mapping[str, torch.Tensor],
    config: RunConfig,
    class_names: Sequence[str],
    image_shape: tuple[int, int, int],
    example: npt.NDArray[np.float32],
    metrics: Mapping[str, float],
    registered_model: str | None,
    facts: Mapping[str, str],
) -> PackagedModel:
    """Package a network, check that the package gives its outputs, store it with its run and register it.

    A run that was registered with the same weights before keeps its version, so repeating this is safe.

    Args:
        uri: Tracking store.
        run_id: MLflow run that trained the network.
        state_dict: Weights and buffers of ``build_model``'s network; stored as float32.
        config: Configuration of the run.
        class_names: K names, in label order.
        image_shape: (C, H, W).
        example: Images (n,C,H,W) in [0, 1], n > 1; the first four become the input example.
        metrics: Test figures: ``clean_accuracy``, ``robust_accuracy/NAME`` as fractions.
        registered_model: Name in the registry; ``None`` stores the model without registering it.
        facts: Data fingerprint (``data_fingerprint``) and what else the card should tell.

    Raises:
        ConfigError: The example does not fit, or the weights are not of this network.
        MlflowException: The server cannot be reached, or refuses.
    """
    if example.ndim != 4 or example.shape[1:] != tuple(image_shape) or len(example) < 2:
        raise ConfigError("example", example.shape, "no batch of at least two images", f"give (n, *{image_shape})")
    made = client(uri)
    run_key = made.get_run(run_id).data.tags.get(RUN_KEY, "")
    with tempfile.TemporaryDirectory(prefix="tla-package-") as scratch:
        source = Path(scratch, "source")
        description = _write_source(source, state_dict, config, class_names, image_shape, metrics, facts, run_key)
        digest = str(description["weights"]["sha256"])
        tags = _version_tags(description)
        earlier = _registered_before(made, registered_model, run_id, digest)
        if earlier is not None:
            return earlier
        model_id = _store(made, run_id, source, Path(scratch, "model"), example[:_EXAMPLE_IMAGES], tags)
    if registered_model is None:
        return PackagedModel(f"models:/{model_id}", None, model_id, digest)
    version = retrying("Registering the model", lambda: _register(made, registered_model, run_id, model_id, tags))
    return PackagedModel(f"models:/{registered_model}/{version}", version, model_id, digest)


def _write_source(
    folder: Path, state_dict: Mapping[str, torch.Tensor], config: RunConfig, class_names: Sequence[str],
    image_shape: tuple[int, int, int], metrics: Mapping[str, float], facts: Mapping[str, str], run_key: str,
) -> dict[str, Any]:
    """Write weights, description, card and code; returns the description."""
    from safetensors.torch import save_file

    folder.mkdir()
    weights = folder / "weights.safetensors"
    save_file({name: _storable(tensor) for name, tensor in state_dict.items()}, weights)
    description = {
        "format_version": FORMAT_VERSION,
        "architecture": config.model.name,
        "num_classes": len(class_names),
        "image_shape": list(image_shape),
        "normalization": config.model.normalization,
        "class_names": list(class_names),
        "method": config.method,
        "threat_model": {"norm": config.attack.norm, "epsilon": config.attack.epsilon},
        "metrics": {name: float(value) for name, value in metrics.items()},
        "facts": dict(facts),
        "run_key": run_key,
        "config_digest": config.digest,
        "weights": {"file": weights.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()},
    }
    (folder / "model.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    (folder / "model_card.md").write_text(model_card(description), encoding="utf-8")
    package = folder / "code" / "tla_service"
    package.mkdir(parents=True)
    home = Path(tla_service.__file__).parent
    for name in _SHIPPED:
        if (home / name).is_dir():
            shutil.copytree(home / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(home / name, package / name)
    return description


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 (or integer) copy that shares no memory, as safetensors demands."""
    kept = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return kept.clone(memory_format=torch.contiguous_format)


def _store(
    made: "MlflowClient", run_id: str, source: Path, folder: Path, example: npt.NDArray[np.float32], tags: Mapping[str, str]
) -> str:
    """Write the model folder, check it, and store it as a logged model of the run; returns the model's id."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models.model import Model

    experiment = made.get_run(run_id).info.experiment_id
    logged = retrying(
        "Opening the model",
        lambda: made.create_logged_model(experiment, name="model", source_run_id=run_id, tags=dict(tags), model_type="classifier"),
    )
    model_id = str(logged.model_id)
    try:
        # The run knows of the model by its outputs: this is what runs:/RUN/model looks up.
        made.log_outputs(run_id, models=[LoggedModelOutput(model_id, 0)])
        model = Model(artifact_path=logged.artifact_location, model_uuid=model_id, run_id=run_id, model_id=model_id)
        _save(model, source, folder, example)
        _check(source, folder, example)
        retrying("Storing the model", lambda: made.log_model_artifacts(model_id, str(folder)))
    except BaseException:
        with contextlib.suppress(Exception):
            made.finalize_logged_model(model_id, "FAILED")
        raise
    made.finalize_logged_model(model_id, "READY")
    return model_id


def _save(model: "Model", source: Path, folder: Path, example: npt.NDArray[np.float32]) -> None:
    with warnings.catch_warnings():
        # MLflow warns of a type hint of its own while it imports.
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")
        import mlflow.pyfunc

    names = {"weights": "weights.safetensors", "model": "model.json", "card": "model_card.md"}
    shape, classes = example.shape[1:], len(json.loads((source / "model.json").read_text(encoding="utf-8"))["class_names"])
    with _unchanged_path(), quiet("mlflow.pyfunc"):
        mlflow.pyfunc.save_model(
            path=str(folder), mlflow_model=model, python_model=str(_ENTRY), code_paths=[str(source / "code" / "tla_service")],
            artifacts={name: str(source / file) for name, file in names.items()},
            signature=_signature(shape, classes), input_example=np.ascontiguousarray(example, dtype=np.float32),
            pip_requirements=requirements(),
        )
    # MLflow notes paths of this machine, and a cloudpickle version although nothing here is pickled.
    flavor = model.flavors["python_function"]
    flavor.pop("cloudpickle_version", None)
    flavor["model_code_path"] = _ENTRY.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    model.save(str(folder / "MLmodel"))
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)


def requirements() -> list[str]:
    """What a version needs, pinned to what is installed; ``+cpu`` and ``+cu130`` go, since PyPI has no such versions."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def _signature(image_shape: tuple[int, ...], classes: int) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    outputs = [
        TensorSpec(np.dtype(np.int64), (-1,), "label"),
        TensorSpec(np.dtype(np.float32), (-1, classes), "probabilities"),
    ]
    inputs = [TensorSpec(np.dtype(np.float32), (-1, *image_shape))]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def _check(source: Path, folder: Path, example: npt.NDArray[np.float32]) -> None:
    """Load the package as its users will: what cannot be loaded, or would need pickle, is never registered."""
    pickles = find_pickles(folder)
    if pickles:
        raise AssertionError(f"the package holds pickle files: {pickles}")
    network = load_model(str(folder))
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.ascontiguousarray(example, dtype=np.float32))).logits
    if not torch.isfinite(logits).all():
        raise ConfigError("model.weights", str(source.name), "the network gives no finite outputs", "train with a lower rate")


def _register(made: "MlflowClient", name: str, run_id: str, model_id: str, tags: Mapping[str, str]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        made.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = made.get_logged_model(model_id).artifact_location
    made_version = made.create_model_version(
        name, source, run_id=run_id, tags={**tags, "model_id": model_id}, model_id=model_id
    )
    return str(made_version.version)


def _registered_before(made: "MlflowClient", name: str | None, run_id: str, digest: str) -> PackagedModel | None:
    """The version this run registered for these very weights, in an earlier attempt of the job."""
    if name is None:
        return None
    for found in made.search_model_versions(f"name='{name}' and run_id='{run_id}'"):
        if found.tags.get("weights_sha256") == digest:
            return PackagedModel(f"models:/{name}/{found.version}", str(found.version), found.tags["model_id"], digest)
    return None


def _version_tags(description: Mapping[str, Any]) -> dict[str, str]:
    threat = description["threat_model"]
    tags = {
        "run_key": description["run_key"], "method": description["method"], "norm": threat["norm"],
        "epsilon": f"{threat['epsilon']:.9g}", "weights_sha256": description["weights"]["sha256"],
        FINGERPRINT: description["facts"].get(FINGERPRINT, ""),
    }
    return tags | {name: f"{value:.6f}" for name, value in description["metrics"].items() if "accuracy" in name}


@contextlib.contextmanager
def _unchanged_path() -> Iterator[None]:
    """Undo what MLflow adds to ``sys.path`` while it saves: folders that are about to be deleted."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before
