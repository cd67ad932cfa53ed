"""From an address to a real network: of a model version, a run, a packaged folder or a checkpoint."""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tla_service.config import RunConfig, TrackingConfig
from tla_service.config.yaml_files import parse_yaml
from tla_service.errors import ConfigError, UnavailableError
from tla_service.models import LogitsOnly, build_model
from tla_service.registry.integrity import MANIFEST, sha256, verify_package
from tla_service.tracking.connection import client, one_line, retrying, sqlite_path, tracking_uri
from tla_service.tracking.store_errors import shown

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient

FORMAT_VERSION = 2
PACKAGE_DIGEST = "package_sha256"  # tag with the digest of the list of files
FIELD = "model.weights"
_SCHEMES = ("models:/", "runs:/")
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
T = TypeVar("T")


def load_model(
    uri: str, device: str = "cpu", tracking: str | None = None, *, logits_only: bool = False
) -> "torch.nn.Module":
    """Load a network: its parameters train, and gradients reach its input.

    Nothing that is loaded can run code: weights are safetensors, the network is built by this installation. Every file
    of a packaged model is compared with the digest it was packaged with.

    Args:
        uri: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, ``models:/m-...``, ``runs:/RUN/model``, a packaged
            model's folder, or a checkpoint folder (``best.safetensors``, ``config.yaml``, ``data.json``).
        device: Where to put it.
        tracking: Tracking store of ``models:`` and ``runs:``; default: as :func:`tracking_uri` finds it.
        logits_only: Give a module that returns logits (N, K) alone, as RobustBench, AutoAttack and other toolboxes
            expect; ``.classifier`` is the network itself.

    Returns:
        The network in eval mode: ``forward(images float32 (N,C,H,W) in [0, 1])`` gives logits and embeddings.

    Raises:
        ConfigError: The address cannot be one, or names what this installation cannot build.
        UnavailableError: There is no such model, it was changed, or the server is away.
    """
    network, _ = load_with_folder(uri, tracking)
    network = network.to(device)
    return LogitsOnly(network).eval() if logits_only else network


def load_with_folder(uri: str, tracking: str | None = None) -> tuple["torch.nn.Module", Path]:
    """As :func:`load_model`, on the CPU, and the local folder that it came from."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder, digest = _fetch(uri, tracking)
    files = _checkpoint(folder, uri) if (folder / "best.safetensors").is_file() else _package(folder, uri, digest)
    weights, architecture, num_classes, image_shape, normalization = files
    network = build_model(architecture, num_classes, image_shape, normalization)
    try:
        network.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        reason = f"the weights are not those of {architecture} ({one_line(error)})"
        raise UnavailableError(FIELD, uri, reason, "choose other weights") from error
    return network.eval(), folder


def resolve_weights(uri: str, tracking: str | None = None) -> Path:
    """Bring what an address names to this machine.

    Args:
        uri: As for :func:`load_model`.
        tracking: As for :func:`load_model`.

    Returns:
        A local folder. A download is deleted when the process ends.

    Raises:
        ConfigError: The address cannot be one.
        UnavailableError: There is nothing at it, or the server is away.
    """
    return _fetch(uri, tracking)[0]


def pin_version(uri: str, tracking: str | None = None) -> str:
    """The version that an address names now, as ``models:/NAME/VERSION``: an alias may move, a version does not.

    Raises:
        ConfigError: It is not the address of a registered version.
        UnavailableError: There is no such version, or the server is away.
    """
    name, _, alias = uri.removeprefix("models:/").rpartition("@")
    if not uri.startswith("models:/") or not name:
        if not re.fullmatch(r"models:/[^/@]+/\d+", uri):
            raise ConfigError("model", uri, "names no registered version", "write models:/NAME@ALIAS or models:/NAME/N")
        return uri
    store = tracking or _current_store()
    found = _asking(uri, store, lambda: client(store).get_model_version_by_alias(name, alias))
    return f"models:/{name}/{found.version}"


def _fetch(uri: str, tracking: str | None) -> tuple[Path, str | None]:
    """The local folder of an address, and the digest of its list of files, if a registry keeps one."""
    if not uri.startswith(_SCHEMES):
        if uri.partition(":")[0] in ("models", "runs"):
            raise ConfigError(
                FIELD, uri, "not an address of MLflow", "write models:/NAME/VERSION or runs:/RUN_ID/model"
            )
        folder = Path(uri).expanduser()
        if not folder.is_dir():
            raise UnavailableError(
                FIELD, uri, "there is no such folder", "give a checkpoint folder, runs:/... or models:/..."
            )
        return folder, None
    store = tracking or _current_store()
    database = sqlite_path(store)
    if database is not None and not database.is_file():
        raise UnavailableError(FIELD, uri, f"there is no tracking store at {database}", "set MLFLOW_TRACKING_URI")
    target = tempfile.mkdtemp(prefix="tla-weights-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    location, digest = _locate(uri, store)
    return _download(uri, location, store, target), digest


def _current_store() -> str:
    import mlflow

    # What a notebook chose with mlflow.set_tracking_uri counts before our own default.
    is_chosen = mlflow.is_tracking_uri_set()  # type: ignore[no-untyped-call]
    return mlflow.get_tracking_uri() if is_chosen else tracking_uri(TrackingConfig())


def _download(uri: str, location: str, store: str, target: str) -> Path:
    from mlflow.artifacts import download_artifacts

    def fetch() -> str:
        return str(download_artifacts(artifact_uri=location, dst_path=target, tracking_uri=store))

    return Path(_asking(uri, store, fetch))


def _asking(uri: str, store: str, question: Callable[[], T]) -> T:
    """Ask the store something about an address; what goes wrong becomes a sentence."""
    try:
        return retrying(f"Fetching {uri}", question, seconds=4)
    except ConfigError:
        raise
    except UnavailableError as error:
        raise UnavailableError(FIELD, uri, error.reason, error.remedy) from error
    except Exception as error:
        if getattr(error, "error_code", "") in _MISSING:
            remedy = f"look at what {shown(store)} holds, or set MLFLOW_TRACKING_URI"
        else:
            remedy = "see that its files can be read from here, and what the tracking store's log says"
        raise UnavailableError(FIELD, uri, f"cannot be fetched ({one_line(error)})", remedy) from error


def _locate(uri: str, store: str) -> tuple[str, str | None]:
    """Where the files of an address are, and the digest of their list.

    MLflow would ask the process's global store, whatever store it is given.
    """
    return _asking(uri, store, lambda: _location(uri, client(store)))


def _location(uri: str, made: "MlflowClient") -> tuple[str, str | None]:
    kind, _, rest = uri.partition(":/")
    if kind == "runs":
        run_id, _, path = rest.strip("/").partition("/")
        run = made.get_run(run_id)
        outputs = run.outputs.model_outputs if run.outputs is not None else []
        models = [made.get_logged_model(output.model_id) for output in outputs]
        named = [model for model in models if model.name == path and model.status == "READY"]
        if not named:
            return f"{run.info.artifact_uri}/{path}", None
        newest = max(named, key=lambda model: model.creation_timestamp)
        return str(newest.artifact_location), newest.tags.get(PACKAGE_DIGEST)
    name, _, version = rest.rpartition("/")
    if not name and rest.startswith("m-"):
        model = made.get_logged_model(rest)
        return str(model.artifact_location), model.tags.get(PACKAGE_DIGEST)
    if "@" in rest:
        name, _, alias = rest.rpartition("@")
        version = made.get_model_version_by_alias(name, alias).version
    elif not name or not version.isdecimal():
        raise ConfigError(FIELD, uri, "names no version", "write models:/NAME/VERSION or models:/NAME@ALIAS")
    found = made.get_model_version(name, str(version))
    return str(made.get_model_version_download_uri(name, str(version))), found.tags.get(PACKAGE_DIGEST)


def open_package(uri: str, tracking: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Bring a packaged model to this machine and make sure that nobody touched it.

    Args:
        uri: As for :func:`load_model`; not a checkpoint.
        tracking: As for :func:`load_model`.

    Returns:
        The local folder of its artifacts, and the content of ``model.json``.

    Raises:
        ConfigError: The address cannot be one, or the package is of another format.
        UnavailableError: There is no such model, it was changed, or the server is away.
    """
    folder, digest = _fetch(uri, tracking)
    return _opened(folder, uri, digest)


def _opened(folder: Path, uri: str, digest: str | None) -> tuple[Path, dict[str, Any]]:
    # The folder of the artifacts alone is an address too; the list of files lies above it.
    is_inner = folder.name == "artifacts" and (folder.parent / MANIFEST).is_file()
    verify_package(folder.parent if is_inner else folder, FIELD, uri, digest)
    artifacts = folder if is_inner else folder / "artifacts"
    try:
        description = _json(artifacts / "model.json")
    except FileNotFoundError as error:
        reason = "holds no model.json, so it was not packaged by this project"
        raise UnavailableError(FIELD, uri, reason, "give a model of this project, or a checkpoint folder") from error
    if description.get("format_version") != FORMAT_VERSION:
        reason = f"format version {description.get('format_version')}; this installation reads {FORMAT_VERSION}"
        raise ConfigError(FIELD, uri, reason, "install the version of tla-service that wrote it")
    weights = description["weights"]
    if sha256(artifacts / weights["file"]) != weights["sha256"]:
        reason = f"{weights['file']} was changed: its SHA-256 is not {weights['sha256'][:12]}..."
        raise UnavailableError(FIELD, uri, reason, "load another version")
    return artifacts, description


def _package(folder: Path, uri: str, digest: str | None) -> tuple[bytes, str, int, tuple[int, int, int], str]:
    """Weights and network of a packaged model, after checking that nobody touched it."""
    artifacts, description = _opened(folder, uri, digest)
    return (
        (artifacts / description["weights"]["file"]).read_bytes(),
        description["architecture"],
        description["num_classes"],
        _shape(description["image_shape"]),
        description["normalization"],
    )


def _checkpoint(folder: Path, uri: str) -> tuple[bytes, str, int, tuple[int, int, int], str]:
    """Weights and network of a checkpoint folder that training wrote."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = RunConfig.model_validate(parse_yaml(text, FIELD, uri))
        data = _json(folder / "data.json")
    except FileNotFoundError as error:
        reason = f"the checkpoint is not complete: there is no {Path(error.filename).name}"
        raise UnavailableError(FIELD, uri, reason, "give another checkpoint") from error
    weights = (folder / "best.safetensors").read_bytes()
    return weights, config.model.name, len(data["class_names"]), _shape(data["image_shape"]), config.model.normalization


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _shape(values: list[int]) -> tuple[int, int, int]:
    channels, height, width = values
    return channels, height, width
