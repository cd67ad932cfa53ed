"""Loads networks from a model version, a run, a packaged folder or a checkpoint."""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tla_service.config import TrackingConfig
from tla_service.errors import ConfigError, UnavailableError, readable
from tla_service.files import expanded
from tla_service.registry.integrity import verify_package
from tla_service.tracking.connection import client, retrying, sqlite_path, tracking_uri

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient

    from tla_service.inference.predictor import Predictor

FORMAT_VERSION = 2
PACKAGE_DIGEST = "package_sha256"  # tag: the digest of the manifest
FIELD = "model"
T = TypeVar("T")


def load_model(
    uri: str, device: str = "cpu", tracking: str | None = None, *, logits_only: bool = False
) -> "torch.nn.Module":
    """Load a network, differentiable with respect to its parameters and its input.

    Weights are safetensors, and the network is built by this installation, so that loading runs no code from the model,
    with one exception: a network of your own (``package.module:factory``) is built by its factory, from the code in the
    version or checkpoint. Load such a model only if you trust whoever registered it. Every file of a packaged model is
    compared with the digest it was packaged with.

    Args:
        uri: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, ``models:/m-...``, ``runs:/RUN/model``, the folder of a
            packaged model, or a checkpoint folder (``best.safetensors``, ``config.yaml``, ``data.json``).
        device: Device of the network.
        tracking: Tracking store of ``models:`` and ``runs:``. Default: the one set with ``mlflow.set_tracking_uri``,
            else MLFLOW_TRACKING_URI, else ``mlflow.db`` in the working folder.
        logits_only: Return a module whose output is the logits (N, K) only, as RobustBench, AutoAttack and other
            toolboxes expect; its ``classifier`` is the network.

    Returns:
        The network in eval mode: ``forward(images float32 (N,C,H,W) in [0, 1])`` returns logits and embeddings.

    Raises:
        ConfigError: The address is invalid, or names an architecture that this installation cannot build.
        UnavailableError: The model does not exist, was modified, or the server is unavailable.
    """
    from tla_service.models import LogitsOnly

    network, _ = load_with_folder(uri, tracking)
    network = network.to(device)
    return LogitsOnly(network).eval() if logits_only else network


def load_with_folder(uri: str, tracking: str | None = None) -> tuple["torch.nn.Module", Path]:
    """As :func:`load_model`, on the CPU, and the local folder that it was loaded from."""
    from tla_service.report.subjects import WEIGHTS, read_checkpoint  # imports torch

    folder, digest = fetch_package(uri, tracking)
    if (folder / WEIGHTS).is_file():
        return read_checkpoint(folder, uri, FIELD).network, folder
    return open_predictor(folder, uri, digest).network, folder


def open_predictor(folder: Path, uri: str, digest: str | None) -> "Predictor":
    """The verified content, on the CPU, of the packaged model that `fetch_package` returned; `uri` is for messages."""
    from tla_service.inference.predictor import Predictor  # imports torch, which settings in this package do without

    artifacts, _ = open_folder(folder, uri, digest)
    with readable(FIELD, uri, "load another version"):
        return Predictor.load(artifacts, "cpu")


def open_package(uri: str, tracking: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Download a packaged model and verify that it is unmodified; arguments and errors as for :func:`load_model`.

    Returns the local folder of its artifacts, deleted when the process ends, and the content of ``model.json``.
    """
    from tla_service.report.subjects import WEIGHTS  # imports torch

    folder, digest = fetch_package(uri, tracking)
    if (folder / WEIGHTS).is_file():
        raise ConfigError(FIELD, uri, "a checkpoint, not a packaged model", "give models:/NAME/VERSION, or its folder")
    return open_folder(folder, uri, digest)


def pin_version(uri: str, tracking: str | None = None) -> str:
    """Resolve ``models:/NAME@ALIAS`` to ``models:/NAME/VERSION``: an alias may move, a version does not."""
    store = _store(uri, tracking)
    name, version = _asking(uri, store, lambda: _named_version(uri, client(store)))
    return f"models:/{name}/{version}"


def fetch_package(uri: str, tracking: str | None) -> tuple[Path, str | None]:
    """The local folder of an address, and the digest of its manifest if a registry has one; not verified yet."""
    if not uri.startswith(("models:/", "runs:/")):
        if uri.partition(":")[0] in ("models", "runs"):
            remedy = "write models:/NAME/VERSION or runs:/RUN_ID/model"
            raise ConfigError(FIELD, uri, "not an MLflow address", remedy)
        folder = expanded(FIELD, uri)
        if not folder.is_dir():
            remedy = "give a checkpoint folder, runs:/... or models:/..."
            raise UnavailableError(FIELD, uri, "there is no such folder", remedy)
        return folder, None
    from mlflow.artifacts import download_artifacts

    store = _store(uri, tracking)
    target = tempfile.mkdtemp(prefix="tla-weights-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)

    def fetch() -> tuple[Path, str | None]:
        location, digest = _locate(uri, client(store))
        return Path(download_artifacts(artifact_uri=location, dst_path=target, tracking_uri=store)), digest

    return _asking(uri, store, fetch)


def _store(uri: str, tracking: str | None) -> str:
    """The tracking store; refuses an SQLite file that does not exist, which a client would create."""
    import mlflow

    is_chosen = mlflow.is_tracking_uri_set()  # type: ignore[no-untyped-call]
    store = tracking or (mlflow.get_tracking_uri() if is_chosen else tracking_uri(TrackingConfig()))
    database = sqlite_path(store)
    if database is not None and not database.is_file():
        remedy = "give --tracking.uri, or set MLFLOW_TRACKING_URI"
        raise UnavailableError(FIELD, uri, f"there is no tracking store at {database}", remedy)
    return store


def _asking(uri: str, store: str, question: Callable[[], T]) -> T:
    """Query the store about an address; every error becomes a user's error."""
    remedy = f"check what {store} contains and that its files can be read from here, or set MLFLOW_TRACKING_URI"
    with readable(FIELD, uri, remedy):
        return retrying(f"Fetching {uri}", question, seconds=4)


def _locate(uri: str, made: "MlflowClient") -> tuple[str, str | None]:
    """The artifact location of an address, and its manifest's digest. MLflow would query its global store instead."""
    scheme, _, rest = uri.partition(":/")
    if scheme == "runs":
        run_id, _, path = rest.strip("/").partition("/")
        run = made.get_run(run_id)
        outputs = run.outputs.model_outputs if run.outputs is not None else []
        models = [made.get_logged_model(output.model_id) for output in outputs]
        named = [model for model in models if model.name == path and model.status == "READY"]
        if not named:
            return f"{run.info.artifact_uri}/{path}", None
        newest = max(named, key=lambda model: model.creation_timestamp)
        return str(newest.artifact_location), newest.tags.get(PACKAGE_DIGEST)
    if "/" not in rest and rest.startswith("m-"):
        model = made.get_logged_model(rest)
        return str(model.artifact_location), model.tags.get(PACKAGE_DIGEST)
    name, version = _named_version(uri, made)
    found = made.get_model_version(name, version)
    return str(made.get_model_version_download_uri(name, version)), found.tags.get(PACKAGE_DIGEST)


def _named_version(uri: str, made: "MlflowClient") -> tuple[str, str]:
    """Name and number of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``."""
    # A name may contain "@" if it was changed in MLflow.
    found = re.fullmatch(r"models:/(?:([^/]+)/([0-9]+)|([^/]+)@([^/@]+))", uri)
    if found is None:
        raise ConfigError(FIELD, uri, "names no version", "write models:/NAME/VERSION or models:/NAME@ALIAS")
    name, version, model, alias = found.groups()
    return (name, version) if name else (model, str(made.get_model_version_by_alias(model, alias).version))


def open_folder(folder: Path, uri: str, digest: str | None) -> tuple[Path, dict[str, Any]]:
    """As :func:`open_package`, of what `fetch_package` returned; `uri` is for messages."""
    verify_package(folder, uri, digest)
    artifacts = folder / "artifacts"
    with readable(FIELD, uri, "load another version"):
        description: dict[str, Any] = dict(json.loads((artifacts / "model.json").read_text(encoding="utf-8")))
        if description.get("format_version") != FORMAT_VERSION:
            reason = f"has format version {description.get('format_version')}; this installation reads {FORMAT_VERSION}"
            raise ConfigError(FIELD, uri, reason, "install the version of tla-service that wrote it")
    return artifacts, description
