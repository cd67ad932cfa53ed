"""A model to evaluate by its address in MLflow, or in a folder."""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from mlflow.exceptions import MlflowException
from torch import Tensor

from tla_service.config import RunConfig
from tla_service.config.yaml_files import read_yaml
from tla_service.errors import ConfigError, UnavailableError, one_line, readable
from tla_service.inference.predictor import Predictor
from tla_service.models import Architecture
from tla_service.registry.loading import fetch_package, open_predictor, pin_version
from tla_service.report.schema import ModelFacts, ThreatModel
from tla_service.report.subjects import WEIGHTS, Subject, read_checkpoint, read_stored
from tla_service.tracking.connection import client
from tla_service.tracking.runs import fetch_files


def load_subject(uri: str, field: str, tracking: str) -> Subject:
    """Load a model with what is known of it; addresses and errors as for `load_model`, about the setting `field`."""
    is_named = re.fullmatch(r"models:/.+[@/].+", uri) is not None
    try:
        # The version that an alias names now: it may move while the files are fetched.
        pinned = pin_version(uri, tracking) if is_named else uri
        folder, digest = fetch_package(pinned, tracking)
        predictor = None if (folder / WEIGHTS).is_file() else open_predictor(folder, pinned, digest)
    except (ConfigError, UnavailableError) as error:
        raise type(error)(field, uri, error.reason, error.remedy) from error
    if predictor is None:
        return read_checkpoint(folder, uri, field)
    name, _, version = pinned.removeprefix("models:/").rpartition("/") if is_named else (None, "", None)
    with readable(field, uri, "load another version"):
        return _described(uri, tracking, predictor, folder, name, version)


def _described(
    uri: str, tracking: str, predictor: Predictor, folder: Path, name: str | None, version: str | None
) -> Subject:
    """A loaded model with what its folder and its run tell of it."""
    described = predictor.description
    run_id = config = None
    if uri.startswith(("models:/", "runs:/")):
        run_id = read_yaml(folder / "MLmodel", "model").get("run_id")
        config = _run_config(tracking, run_id) if run_id else None
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
    return Subject(
        facts=facts,
        architecture=Architecture.described(described, folder / "artifacts"),
        network=predictor.network,
        image_shape=predictor.image_shape,
        class_names=predictor.class_names,
        config=config,
        trained_on=described.get("facts", {}).get("data_fingerprint"),
        stored=None if run_id is None else partial(_stored, tracking, run_id),
        rejector=predictor.rejector,
    )


def _stored(tracking: str, run_id: str, name: str) -> Mapping[str, Tensor]:
    """Tensors of a file of the checkpoint that is stored with a run; UnavailableError if there is none."""
    with _fetched(tracking, run_id, name, "checkpoint") as path:
        if path is None:
            reason = f"its run {run_id} keeps no checkpoint/{name}"
            raise UnavailableError("checkpoint", run_id, reason, "evaluate the checkpoint folder")
        return read_stored(path.parent, name)


def _run_config(tracking: str, run_id: str) -> RunConfig | None:
    with _fetched(tracking, run_id, "config.yaml") as path:
        try:
            return None if path is None else RunConfig.model_validate(read_yaml(path, "model"))
        except ValueError as error:
            reason = f"the configuration of its run {run_id} cannot be read ({one_line(error)})"
            remedy = "install the version of tla-service that trained it"
            raise ConfigError("model", None, reason, remedy) from error


@contextlib.contextmanager
def _fetched(tracking: str, run_id: str, name: str, folder: str = "") -> Iterator[Path | None]:
    """A file of a run; None if the run has none, or is gone."""
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.suppress(MlflowException):
            fetch_files(client(tracking), run_id, [name], Path(scratch), folder)
        path = Path(scratch, name)
        yield path if path.is_file() else None
