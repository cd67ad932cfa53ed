"""Packages a network as an MLflow model version: safetensors weights, the code that runs them, and no pickle."""

import contextlib
import functools
import importlib.metadata
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, RunInfo
from mlflow.exceptions import MlflowException

import tla_service
from tla_service.config import RunConfig
from tla_service.errors import ConfigError
from tla_service.evaluation.detection import check_detector_size
from tla_service.files import sha256
from tla_service.inference.detector import Rejector
from tla_service.models import Architecture
from tla_service.pixels import describe
from tla_service.registry.integrity import write_manifest
from tla_service.registry.loading import FORMAT_VERSION, PACKAGE_DIGEST, load_model
from tla_service.report.page import NORMS, template
from tla_service.report.schema import ThreatModel
from tla_service.tracking.connection import client, storing
from tla_service.tracking.runs import FINGERPRINT, RUN_KEY

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.models.model import Model

_FEWEST_IMAGES = 2  # a single image would fix the batch size
_SHIPPED = ("__init__.py", "errors.py", "pickles.py", "pixels.py", "models", "inference")
_REQUIREMENTS = ("mlflow", "numpy", "pillow", "safetensors", "torch", "torchvision")
_METADATA = ("architecture", "method", "threat_model", "class_names", "image_shape", "preprocessing", "detector")
_ENTRY = Path(__file__).with_name("pyfunc_entry.py")


def check_packaging(config: RunConfig, class_names: Sequence[str], test_images: int, embedding_size: int) -> None:
    """Refuse before training what could not be packaged after it: too few images, a bad name, a huge detector."""
    if test_images < _FEWEST_IMAGES:
        field = "data.test_limit" if config.data.test_limit else "data.root"
        reason = f"{test_images} test image; the input example of a packaged model takes at least {_FEWEST_IMAGES}"
        value = config.data.test_limit or config.data.root
        raise ConfigError(field, value, reason, f"use {_FEWEST_IMAGES} test images or more")
    for name in class_names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            reason = f"the class name {name!r} is not valid UTF-8, which a package's files require"
            raise ConfigError("data.root", config.data.root, reason, "rename the class") from error
    check_detector_size(config.detection.covariance, len(class_names), embedding_size)


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
    rejector: Rejector | None = None,
    method: str | None = None,
    code: bytes | None = None,
) -> str:
    """Package a network, verify that the package loads, store it with its run and register it.

    Idempotent: a run that registered the same weights before keeps its version. `example` has images (n,C,H,W) in
    [0, 1], n > 1, which become the input example. `facts` are shown on the model card. `method` is
    given if it is not that of the configuration, `code` if it is not that of the folder there.

    Returns ``models:/NAME/VERSION``, or ``models:/m-...`` without `registered_model`.
    """
    made = client(uri)
    run = storing("Reading the run", lambda: made.get_run(run_id))
    architecture = Architecture.of(config.model, code)
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "num_classes": len(class_names),
        "requirements": architecture.requirements(),
        "image_shape": list(image_shape),
        "preprocessing": describe(image_shape, resize=config.data.resizes_files),
        "class_names": list(class_names),
        "method": method or config.method,
        "threat_model": {"norm": config.attack.norm, "epsilon": config.attack.epsilon},
        "metrics": {name: float(value) for name, value in metrics.items()},
        "facts": dict(facts),
        "run_key": run.data.tags.get(RUN_KEY, ""),
        "config_digest": config.digest if method is None else "",
    }
    with tempfile.TemporaryDirectory(prefix="tla-package-") as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        description |= architecture.write(source)
        _write_source(source, description, state_dict, rejector)
        digest = description["weights"]["sha256"]
        tags = {
            "run_key": description["run_key"],
            "method": description["method"],
            "norm": config.attack.norm,
            "epsilon": f"{config.attack.epsilon:.9g}",
            "weights_sha256": digest,
            FINGERPRINT: facts.get(FINGERPRINT, ""),
        }
        tags |= {name: f"{value:.6f}" for name, value in metrics.items() if "accuracy" in name}

        def registered() -> str | None:
            """The version that this run registered for these weights in an earlier attempt."""
            found = made.search_model_versions(f"name='{registered_model}' and run_id='{run_id}'")
            versions = (each.version for each in found if each.tags.get("weights_sha256") == digest)
            return next((f"models:/{registered_model}/{version}" for version in versions), None)

        earlier = storing("Finding versions", registered) if registered_model is not None else None
        if earlier is not None:
            return earlier
        model_id, tags[PACKAGE_DIGEST] = _store(made, run.info, source, example, tags)
    if registered_model is None:
        return f"models:/{model_id}"

    def register() -> str:
        # An attempt whose response was lost may have created the version.
        return registered() or _register(made, registered_model, run_id, model_id, tags)

    return storing("Registering the model", register)


def _write_source(
    folder: Path, description: dict[str, Any], state_dict: Mapping[str, torch.Tensor], rejector: Rejector | None
) -> None:
    """Write a package's files to a folder, and complete its description."""
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file

    weights, detector = folder / "weights.safetensors", folder / "detector.safetensors"
    save_file({name: _storable(tensor) for name, tensor in state_dict.items()}, weights)
    description |= {"weights": {"file": weights.name, "sha256": sha256(weights)}, "detector": None}
    if rejector is not None:
        save_arrays(rejector.to_arrays(), detector)
        names = ("threshold", "false_rejection_rate", "training_images", "validation_images")
        described = {name: getattr(rejector, name) for name in names}
        description["detector"] = {"file": detector.name, "sha256": sha256(detector), **described}
    (folder / "model.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    threat = ThreatModel.model_validate(description["threat_model"])
    card = template("model_card.md.j2").render(description, norm=NORMS[threat.norm], radius=threat.radius)
    (folder / "model_card.md").write_text(f"{card}\n", encoding="utf-8")
    package, home = folder / "code" / "tla_service", Path(tla_service.__file__).parent
    package.mkdir(parents=True)
    for name in _SHIPPED:
        if (home / name).is_dir():
            shutil.copytree(home / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(home / name, package / name)


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 (or integer) copy that shares no memory, as safetensors requires."""
    kept = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return kept.clone(memory_format=torch.contiguous_format)


def _store(
    made: MlflowClient, run: RunInfo, source: Path, example: npt.NDArray[np.float32], tags: Mapping[str, str]
) -> tuple[str, str]:
    """Write the model folder, verify it, and store it as a logged model of the run; returns its id and digest."""
    from mlflow.models.model import Model

    folder, run_id = source.with_name("model"), run.run_id
    create = functools.partial(made.create_logged_model, run.experiment_id, "model", run_id)
    logged = storing("Creating the model", lambda: create(tags=dict(tags), model_type="classifier"))
    model_id = str(logged.model_id)
    try:
        # runs:/RUN/model resolves through the outputs of the run.
        outputs = [LoggedModelOutput(model_id, 0)]
        storing("Linking the model", lambda: made.log_outputs(run_id, models=outputs))
        model = Model(artifact_path=logged.artifact_location, model_uuid=model_id, run_id=run_id, model_id=model_id)
        digest = _save_folder(model, source, folder, example)
        _verify(folder, example)
        storing("Storing the model", lambda: made.log_model_artifacts(model_id, str(folder)))
        storing("Tagging the model", lambda: made.set_logged_model_tags(model_id, {PACKAGE_DIGEST: digest}))
    except BaseException:
        with contextlib.suppress(Exception):
            made.finalize_logged_model(model_id, "FAILED")
        raise
    storing("Finalizing the model", lambda: made.finalize_logged_model(model_id, "READY"))
    return model_id, digest


def _save_folder(model: "Model", source: Path, folder: Path, example: npt.NDArray[np.float32]) -> str:
    """Write MLflow's model folder; returns its manifest's SHA-256."""
    with warnings.catch_warnings():
        # MLflow warns about a type hint of its own on import.
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")
        import mlflow.pyfunc

    description = json.loads((source / "model.json").read_text(encoding="utf-8"))
    names = {"weights": "weights.safetensors", "model": "model.json", "card": "model_card.md"}
    if description["detector"] is not None:
        names["detector"] = description["detector"]["file"]
    if "code" in description:
        names["code"] = description["code"]
    # Pinned to the installed versions; without +cpu and +cu130, which PyPI does not have.
    pins = {name: importlib.metadata.version(name).partition("+")[0] for name in _REQUIREMENTS}
    others = [line for line in description["requirements"] if re.split(r"[^\w.-]", line)[0].lower() not in pins]
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    path_before = list(sys.path)
    try:
        mlflow.pyfunc.save_model(
            path=str(folder),
            mlflow_model=model,
            python_model=str(_ENTRY),
            code_paths=[str(source / "code" / "tla_service")],
            artifacts={name: str(source / file) for name, file in names.items()},
            signature=_signature(description),
            metadata={name: description[name] for name in _METADATA},
            input_example=np.ascontiguousarray(example, dtype=np.float32),
            pip_requirements=[*(f"{name}=={version}" for name, version in pins.items()), *others],
        )
    finally:
        sys.path[:] = path_before  # MLflow adds folders that are about to be deleted
    # MLflow records paths of this machine, and a cloudpickle version although nothing is pickled.
    flavor = model.flavors["python_function"]
    flavor.pop("cloudpickle_version", None)
    flavor["model_code_path"] = _ENTRY.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    model.save(str(folder / "MLmodel"))
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    return write_manifest(folder)


def _signature(description: Mapping[str, Any]) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    outputs: list[tuple[type[np.generic], tuple[int, ...], str]] = [
        (np.int64, (-1,), "label"),
        (np.float32, (-1, description["num_classes"]), "probabilities"),
    ]
    if description["detector"] is not None:
        outputs += [(np.float64, (-1,), "detection_score"), (np.bool_, (-1,), "accepted")]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *description["image_shape"]))]),
        outputs=Schema([TensorSpec(np.dtype(kind), shape, name) for kind, shape, name in outputs]),
        params=ParamSchema([ParamSpec("embedding", "boolean", default=False)]),
    )
    # Tells MLflow that `predict` validates its input itself: a tensor schema cannot express "float32, uint8 or encoded
    # images", and MLflow would reject the other types.
    signature._is_signature_from_type_hint = True
    return signature


def _verify(folder: Path, example: npt.NDArray[np.float32]) -> None:
    """Load the package as its users will: nothing that does not load, or needs pickle, is registered."""
    network = load_model(str(folder))
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.ascontiguousarray(example, dtype=np.float32))).logits
    if not torch.isfinite(logits).all():
        raise ConfigError("model", None, "the network's outputs are not finite", "lower the learning rate")


def _register(made: MlflowClient, name: str, run_id: str, model_id: str, tags: Mapping[str, str]) -> str:
    try:
        made.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = made.get_logged_model(model_id).artifact_location
    tags = {**tags, "model_id": model_id}
    version = made.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model_id).version
    return f"models:/{name}/{version}"
