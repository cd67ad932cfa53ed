"""Packages a network as an MLflow model version: safetensors weights, the code that runs them, and no pickle."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tla_service.config import RunConfig
from tla_service.errors import ConfigError
from tla_service.inference.detector import Rejector
from tla_service.registry.integrity import find_pickles
from tla_service.registry.loading import FORMAT_VERSION, PACKAGE_DIGEST, load_model
from tla_service.registry.model_folder import save_folder, write_source
from tla_service.tracking.connection import client, storing
from tla_service.tracking.runs import FINGERPRINT, RUN_KEY

if TYPE_CHECKING:
    from mlflow import MlflowClient

_EXAMPLE_IMAGES = 4
_LARGEST_DETECTOR_BYTES = 4 * 10**9
_FEWEST_IMAGES = 2  # a single image would fix the batch size


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
    covariance, classes = config.detection.covariance, len(class_names)
    numbers = {"full": classes * embedding_size**2, "tied": embedding_size**2, "diagonal": classes * embedding_size}
    size = 8 * numbers[covariance]
    if size > _LARGEST_DETECTOR_BYTES:
        reason = f"{classes} classes with {embedding_size} dimensions each need a detector of {size / 1e9:.3g} GB"
        remedy = "use tied" if covariance == "full" else "use diagonal"
        raise ConfigError("detection.covariance", covariance, reason, remedy)


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
) -> str:
    """Package a network, verify that the package loads, store it with its run and register it.

    Idempotent: a run that registered the same weights before keeps its version.

    Args:
        uri: Tracking store.
        run_id: MLflow run that trained the network.
        state_dict: Weights and buffers of ``build_model``'s network; stored as float32.
        config: Configuration of the run.
        class_names: In label order.
        image_shape: (C, H, W).
        example: Images (n,C,H,W) in [0, 1], n > 1; the first four become the input example.
        metrics: Test metrics, accuracies in [0, 1].
        registered_model: Name in the registry; None stores the model without registering it.
        facts: Facts for the model card; ``data_fingerprint`` becomes a tag.
        rejector: Detector of misclassified images, if any.
        method: Training method, if it is not that of the configuration.

    Returns:
        ``models:/NAME/VERSION``, or ``models:/m-...`` if it is not registered.

    Raises:
        ConfigError: The example has another shape, or the weights are not those of this network.
        MlflowException: The server is unavailable, or refuses.
    """
    if example.shape[1:] != tuple(image_shape) or len(example) < _FEWEST_IMAGES:
        reason = f"not a batch of at least {_FEWEST_IMAGES} images"
        raise ConfigError("example", example.shape, reason, f"give (n, *{image_shape})")
    made = client(uri)
    description = {
        "format_version": FORMAT_VERSION,
        "architecture": config.model.name,
        "num_classes": len(class_names),
        "image_shape": list(image_shape),
        "normalization": config.model.normalization,
        "class_names": list(class_names),
        "method": method or config.method,
        "threat_model": {"norm": config.attack.norm, "epsilon": config.attack.epsilon},
        "metrics": {name: float(value) for name, value in metrics.items()},
        "facts": dict(facts),
        "run_key": storing("Reading the run", lambda: made.get_run(run_id)).data.tags.get(RUN_KEY, ""),
        "config_digest": config.digest if method is None else "",
    }
    with tempfile.TemporaryDirectory(prefix="tla-package-") as scratch:
        source = Path(scratch, "source")
        description = write_source(source, description, state_dict, rejector)
        tags = _version_tags(description)

        def registered() -> str | None:
            return _registered_version(made, registered_model, run_id, tags["weights_sha256"])

        earlier = storing("Finding versions", registered)
        if earlier is not None:
            return earlier
        model_id, tags[PACKAGE_DIGEST] = _store(made, run_id, source, example[:_EXAMPLE_IMAGES], tags)
    if registered_model is None:
        return f"models:/{model_id}"

    def register() -> str:
        # An attempt whose response was lost may have created the version.
        return registered() or _register(made, registered_model, run_id, model_id, tags)

    return storing("Registering the model", register)


def _store(
    made: "MlflowClient", run_id: str, source: Path, example: npt.NDArray[np.float32], tags: Mapping[str, str]
) -> tuple[str, str]:
    """Write the model folder, verify it, and store it as a logged model of the run; returns its id and digest."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models.model import Model

    folder = source.with_name("model")
    experiment = storing("Reading the run", lambda: made.get_run(run_id)).info.experiment_id
    logged = storing(
        "Creating the model",
        lambda: made.create_logged_model(experiment, "model", run_id, tags=dict(tags), model_type="classifier"),
    )
    model_id = str(logged.model_id)
    try:
        # runs:/RUN/model resolves through the outputs of the run.
        outputs = [LoggedModelOutput(model_id, 0)]
        storing("Linking the model", lambda: made.log_outputs(run_id, models=outputs))
        model = Model(artifact_path=logged.artifact_location, model_uuid=model_id, run_id=run_id, model_id=model_id)
        digest = save_folder(model, source, folder, example)
        _verify(folder, example)
        storing("Storing the model", lambda: made.log_model_artifacts(model_id, str(folder)))
        storing("Tagging the model", lambda: made.set_logged_model_tags(model_id, {PACKAGE_DIGEST: digest}))
    except BaseException:
        with contextlib.suppress(Exception):
            made.finalize_logged_model(model_id, "FAILED")
        raise
    storing("Finalizing the model", lambda: made.finalize_logged_model(model_id, "READY"))
    return model_id, digest


def _verify(folder: Path, example: npt.NDArray[np.float32]) -> None:
    """Load the package as its users will: nothing that does not load, or needs pickle, is registered."""
    pickles = find_pickles(folder)
    if pickles:
        raise AssertionError(f"the package contains pickle files: {pickles}")
    network = load_model(str(folder))
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.ascontiguousarray(example, dtype=np.float32))).logits
    if not torch.isfinite(logits).all():
        raise ConfigError("model.weights", None, "the network's outputs are not finite", "lower the learning rate")


def _register(made: "MlflowClient", name: str, run_id: str, model_id: str, tags: Mapping[str, str]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        made.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = made.get_logged_model(model_id).artifact_location
    tags = {**tags, "model_id": model_id}
    version = made.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model_id).version
    return f"models:/{name}/{version}"


def _registered_version(made: "MlflowClient", name: str | None, run_id: str, digest: str) -> str | None:
    """The version that this run registered for these weights in an earlier attempt."""
    if name is None:
        return None
    found = made.search_model_versions(f"name='{name}' and run_id='{run_id}'")
    versions = (each.version for each in found if each.tags.get("weights_sha256") == digest)
    return next((f"models:/{name}/{version}" for version in versions), None)


def _version_tags(description: Mapping[str, Any]) -> dict[str, str]:
    threat = description["threat_model"]
    tags = {
        "run_key": description["run_key"],
        "method": description["method"],
        "norm": threat["norm"],
        "epsilon": f"{threat['epsilon']:.9g}",
        "weights_sha256": description["weights"]["sha256"],
        FINGERPRINT: description["facts"].get(FINGERPRINT, ""),
    }
    return tags | {name: f"{value:.6f}" for name, value in description["metrics"].items() if "accuracy" in name}
