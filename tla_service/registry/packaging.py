"""A network as a model version: weights as safetensors, the code that runs them, and nothing that pickles."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tla_service.config import RunConfig
from tla_service.errors import ConfigError
from tla_service.inference.detector import Rejector
from tla_service.registry.integrity import find_pickles
from tla_service.registry.loading import PACKAGE_DIGEST, load_model
from tla_service.registry.model_folder import save_folder, write_source
from tla_service.tracking.connection import client, storing
from tla_service.tracking.runs import FINGERPRINT, RUN_KEY

if TYPE_CHECKING:
    from mlflow import MlflowClient

_EXAMPLE_IMAGES = 4
_LARGEST_DETECTOR_BYTES = 4 * 10**9
_FEWEST_IMAGES = 2  # one image would hide whether the batch size is free


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


def check_packaging(config: RunConfig, class_names: Sequence[str], test_images: int, embedding_size: int) -> None:
    """Refuse before training what could not be packaged after it.

    Args:
        config: The run.
        class_names: K names, in label order.
        test_images: How many test images there are; some become the package's example.
        embedding_size: D, width of the network's embeddings.

    Raises:
        ConfigError: There are too few test images, a class name is no text, or the detector would be too large.
    """
    if test_images < _FEWEST_IMAGES:
        field, value = (
            ("data.test_limit", config.data.test_limit) if config.data.test_limit else ("data.root", config.data.root)
        )
        reason = f"{test_images} test image; the example in a packaged model takes at least {_FEWEST_IMAGES}"
        raise ConfigError(field, value, reason, f"use {_FEWEST_IMAGES} test images or more")
    for name in class_names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            reason = f"the class name {name!r} is not valid UTF-8, and a package's files hold it"
            raise ConfigError("data.root", config.data.root, reason, "rename the class") from error
    covariance, classes = config.detection.covariance, len(class_names)
    numbers = {"full": classes * embedding_size**2, "tied": embedding_size**2, "diagonal": classes * embedding_size}
    size = 8 * numbers[covariance]
    if size > _LARGEST_DETECTOR_BYTES:
        reason = f"{classes} classes with {embedding_size} dimensions each make a detector of {size / 1e9:.3g} GB"
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
) -> PackagedModel:
    """Package a network, check that the package loads, store it with its run and register it.

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
        rejector: Detector of misclassified images, fitted to training images, with its threshold fixed on validation
            images; ``None`` leaves its outputs out.
        method: How it was trained, where that is not as the configuration says.

    Raises:
        ConfigError: The example does not fit, or the weights are not of this network.
        MlflowException: The server cannot be reached, or refuses.
    """
    if example.shape[1:] != tuple(image_shape) or len(example) < _FEWEST_IMAGES:
        raise ConfigError("example", example.shape, "no batch of at least two images", f"give (n, *{image_shape})")
    made = client(uri)
    run_key = storing("Reading the run", lambda: made.get_run(run_id)).data.tags.get(RUN_KEY, "")
    with tempfile.TemporaryDirectory(prefix="tla-package-") as scratch:
        source = Path(scratch, "source")
        description = write_source(
            source,
            state_dict=state_dict,
            config=config,
            class_names=class_names,
            image_shape=image_shape,
            metrics=metrics,
            facts=facts,
            run_key=run_key,
            rejector=rejector,
            method=method,
        )
        digest = str(description["weights"]["sha256"])
        tags = _version_tags(description)
        earlier = storing("Finding versions", lambda: _registered_before(made, registered_model, run_id, digest))
        if earlier is not None:
            return earlier
        model_id, tags[PACKAGE_DIGEST] = _store(made, run_id, source, example[:_EXAMPLE_IMAGES], tags)
    if registered_model is None:
        return PackagedModel(f"models:/{model_id}", None, model_id, digest)

    def register() -> PackagedModel:
        # An attempt whose answer was lost may have made the version.
        earlier = _registered_before(made, registered_model, run_id, digest)
        return earlier or _register(made, registered_model, run_id, model_id, tags)

    return storing("Registering the model", register)


def _store(
    made: "MlflowClient", run_id: str, source: Path, example: npt.NDArray[np.float32], tags: Mapping[str, str]
) -> tuple[str, str]:
    """Write the model folder, check it, and store it as a logged model of the run; returns its id and digest."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models.model import Model

    folder = source.with_name("model")
    experiment = storing("Reading the run", lambda: made.get_run(run_id)).info.experiment_id
    logged = storing(
        "Opening the model",
        lambda: made.create_logged_model(experiment, "model", run_id, tags=dict(tags), model_type="classifier"),
    )
    model_id = str(logged.model_id)
    try:
        # The run knows of the model by its outputs: this is what runs:/RUN/model looks up.
        outputs = [LoggedModelOutput(model_id, 0)]
        storing("Linking the model", lambda: made.log_outputs(run_id, models=outputs))
        model = Model(artifact_path=logged.artifact_location, model_uuid=model_id, run_id=run_id, model_id=model_id)
        digest = save_folder(model, source, folder, example)
        _check(folder, example)
        storing("Storing the model", lambda: made.log_model_artifacts(model_id, str(folder)))
        storing("Tagging the model", lambda: made.set_logged_model_tags(model_id, {PACKAGE_DIGEST: digest}))
    except BaseException:
        with contextlib.suppress(Exception):
            made.finalize_logged_model(model_id, "FAILED")
        raise
    storing("Closing the model", lambda: made.finalize_logged_model(model_id, "READY"))
    return model_id, digest


def _check(folder: Path, example: npt.NDArray[np.float32]) -> None:
    """Load the package as its users will: what cannot be loaded, or would need pickle, is never registered."""
    pickles = find_pickles(folder)
    if pickles:
        raise AssertionError(f"the package holds pickle files: {pickles}")
    network = load_model(str(folder))
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.ascontiguousarray(example, dtype=np.float32))).logits
    if not torch.isfinite(logits).all():
        raise ConfigError("model.weights", None, "the network gives no finite outputs", "lower the learning rate")


def _register(made: "MlflowClient", name: str, run_id: str, model_id: str, tags: Mapping[str, str]) -> PackagedModel:
    from mlflow.exceptions import MlflowException

    try:
        made.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = made.get_logged_model(model_id).artifact_location
    tags = {**tags, "model_id": model_id}
    version = str(made.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model_id).version)
    return PackagedModel(f"models:/{name}/{version}", version, model_id, tags["weights_sha256"])


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
        "run_key": description["run_key"],
        "method": description["method"],
        "norm": threat["norm"],
        "epsilon": f"{threat['epsilon']:.9g}",
        "weights_sha256": description["weights"]["sha256"],
        FINGERPRINT: description["facts"].get(FINGERPRINT, ""),
    }
    return tags | {name: f"{value:.6f}" for name, value in description["metrics"].items() if "accuracy" in name}
