"""The tracking store: its address, a client, retries, and checks before anything is trained."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tla_service.config import TrackingConfig
from tla_service.errors import ConfigError, UnavailableError, UserError, one_line, retried
from tla_service.files import expanded
from tla_service.tracking.store_errors import artifact_cause, connection_cause, database_cause, refusal, sqlite_cause

if TYPE_CHECKING:
    from mlflow import MlflowClient

FIELD = "tracking.uri"
_CHECK_TIMEOUT_SECONDS = 5
_SQLITE = "sqlite:///"
_OLDEST_SERVER = 3
_PROJECT = {"key": "tla.project", "value": "tla-service"}  # a tag of the experiment
_API = "/api/2.0/mlflow/experiments"
_FILE_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
_BUSY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_REFUSALS = {"UNAUTHENTICATED": HTTPStatus.UNAUTHORIZED, "PERMISSION_DENIED": HTTPStatus.FORBIDDEN}
_DISK_ERRORS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")


def tracking_uri(config: TrackingConfig) -> str:
    """The tracking store of a run: ``uri``, else MLFLOW_TRACKING_URI, else ``mlflow.db`` in the working folder.

    SQLite paths are made absolute, so the address means the same in every process.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"
    path = sqlite_path(uri)
    return uri.rstrip("/") if path is None else f"{_SQLITE}{path}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of the database file of an ``sqlite:///`` address; None for every other address."""
    if not uri.startswith(_SQLITE):
        return None
    return expanded("tracking.uri", uri.removeprefix(_SQLITE)).absolute()


def existing_store(config: TrackingConfig) -> str:
    """As `tracking_uri`; UnavailableError for an SQLite file that does not exist, which a client would create."""
    uri = tracking_uri(config)
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise UnavailableError(FIELD, uri, "there is no such file", "give --tracking.uri, or set MLFLOW_TRACKING_URI")
    return uri


def client(uri: str) -> "MlflowClient":
    """An MLflow client; creates the tables of an SQLite file that does not exist yet.

    MLflow retries silently for four minutes. That is turned off for this process, unless the environment sets it:
    see `retrying`. A server is not contacted yet.
    """
    is_folder = ":" not in uri or uri.startswith("file:")
    if is_folder and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() != "true":
        remedy = "write sqlite:////folder/mlflow.db, or the http:// address of a server"
        raise ConfigError(FIELD, uri, f"MLflow 3 no longer supports plain folders, such as {uri}", remedy)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # From a server that serves an S3 store, MLflow would get addresses of the store, which only the server may reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it prints the password in an address
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    with _explained(uri):
        if path is None or _has_tables(path):
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        _check_file(path)
        for name in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log every migration
        with _exclusive(path):
            made = MlflowClient(tracking_uri=uri, registry_uri=uri)
            made.search_registered_models(max_results=1)  # creates the registry's tables as well
            return made


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn errors of a database into `UnavailableError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UnavailableError(FIELD, uri, *database_cause(uri, error)) from error


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock beside an SQLite file: two processes that create MLflow's tables at once crash each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def experiment_id(made: "MlflowClient", name: str, uri: str) -> str:
    """The id of an experiment, created at first use; artifacts of an SQLite store go to ``mlartifacts`` beside it."""
    from mlflow.exceptions import MlflowException

    found = made.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(uri)
        location = None if path is None else (path.parent / "mlartifacts").as_uri()
        try:
            return made.create_experiment(name, artifact_location=location)
        except MlflowException:
            found = made.get_experiment_by_name(name)  # another process may have created it meanwhile
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise _deleted(name, str(found.experiment_id), uri)
    return str(found.experiment_id)


def open_store(config: TrackingConfig) -> tuple[str, "MlflowClient", str]:
    """The tracking store, a client of it, and the id of the configured experiment."""
    uri = tracking_uri(config)
    made = client(uri)
    return uri, made, retrying("Opening the experiment", lambda: experiment_id(made, config.experiment, uri))


def retrying(what: str, action: Callable[[], T], *, seconds: float = 16) -> T:
    """Call something that needs the server; retry with exponential backoff while it is unavailable or busy.

    Raises `UnavailableError` if it stayed so for `seconds`, refuses the credentials, or has deleted the run, and what
    else the call raised.
    """
    try:
        return retried(what, action, is_passing, seconds=seconds)
    except Exception as error:
        status = _REFUSALS.get(str(getattr(error, "error_code", "")))
        deleted = re.search(r"The run (\w+) must be in the 'active' state", str(error))
        if status is None and deleted is None and not is_passing(error):
            raise
        reason = f"{what[0].lower()}{what[1:]} failed ({one_line(error)})"
        remedy = "bring the server back and give the same command again: completed work is not repeated"
        if status is not None:
            remedy = refusal("", status, str(error), is_mlflow=True).remedy
        if deleted is not None:
            again = "give the same command again, which begins another run unless this one is restored"
            remedy = f"{again} (mlflow runs restore --run-id {deleted[1]})"
        raise UnavailableError("MLflow", None, reason, remedy) from error


def storing(what: str, action: Callable[[], T]) -> T:
    """As `retrying`, for five minutes: hours of work must not be lost to a server that restarts."""
    return retrying(what, action, seconds=300)


def search_all(search: Callable[..., Any], **arguments: Any) -> list[Any]:
    """All results of one of a client's searches, page after page."""
    from mlflow.utils import get_results_from_paginated_fn

    found: list[Any] = get_results_from_paginated_fn(  # type: ignore[no-untyped-call]
        lambda count, token: search(**arguments, max_results=count, page_token=token), 100
    )
    return found


def is_passing(error: Exception) -> bool:
    """Whether an error is transient: the server is down or overloaded, or its database is locked."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # Of two processes that set a new tag at once, MLflow inserts it for both, and its database refuses the second.
        if error.error_code == "BAD_REQUEST" and re.search("IntegrityError|UniqueViolation", str(error)):
            return True
        return str(error.error_code) in {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
    if isinstance(error, OSError):  # includes the errors of requests; errors of local files are permanent
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:  # of a proxy in front of the artifacts
            return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _BUSY
        return not isinstance(error, _FILE_ERRORS) and error.errno not in _DISK_ERRORS
    # Artifacts on S3: boto3's connection errors, or an HTTP status, also in the context of a failed upload.
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "botocore.exceptions"}
    answer = getattr(error, "response", None) or getattr(error.__context__, "response", None) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(answer, dict) else 0
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or bool(names & {"HTTPClientError", "ConnectionError"})


def check_tracking(config: TrackingConfig) -> None:
    """Raise `UserError` within seconds if runs cannot be tracked; creates the experiment if it does not exist."""
    uri = tracking_uri(config)
    if uri.partition(":")[0] in ("http", "https"):
        _check_server(uri, config.experiment)
        return
    path = sqlite_path(uri)
    with _explained(uri):
        if path is not None:
            _check_file(path)
        made = client(uri)
        experiment = experiment_id(made, config.experiment, uri)
        key, value = _PROJECT.values()
        made.set_experiment_tag(experiment, key, made.get_experiment(experiment).tags.get(key, value))


def probe_tracking(config: TrackingConfig) -> float:
    """Create a run with a metric and a file, read it back, delete the run if permitted; returns the seconds it took."""
    from mlflow.artifacts import download_artifacts

    check_tracking(config)
    began = time.perf_counter()
    uri, made, experiment = open_store(config)
    run = made.create_run(experiment, run_name="checkup").info
    run_id = run.run_id
    try:
        made.log_metric(run_id, "checkup", 1.0)
        made.log_text(run_id, "ok", "checkup.txt")
        with tempfile.TemporaryDirectory() as folder:
            # Asked for it by the run's id, MLflow calls the file missing whatever the error was.
            where = {"artifact_uri": f"{run.artifact_uri}/checkup.txt", "dst_path": folder, "tracking_uri": uri}
            text = Path(download_artifacts(**where)).read_text()
    except Exception as error:
        raise unstorable(made, uri, run_id, error) from error
    finally:
        with contextlib.suppress(Exception):  # EDIT permission, which a run needs, does not include it
            made.delete_run(run_id)
    if text != "ok":
        reason = "returns a different file than was stored"
        raise UnavailableError(FIELD, uri, reason, "check the server's artifact store")
    return time.perf_counter() - began


def unstorable(made: "MlflowClient", uri: str, run_id: str, error: Exception) -> UnavailableError:
    """What to raise for an error that storing a file with a run raised."""
    return UnavailableError(FIELD, uri, *artifact_cause(str(made.get_run(run_id).info.artifact_uri), error))


def _check_file(path: Path) -> None:
    with _exclusive(path):  # not while another process creates the tables
        cause = sqlite_cause(path)
    if cause is not None:
        reason = f"cannot be opened for writing ({cause.reason})"
        raise UnavailableError(FIELD, f"{_SQLITE}{path}", reason, cause.remedy)


def _check_server(uri: str, experiment: str) -> None:
    status, text, _ = _call(uri, "GET", "/version")
    version = re.fullmatch(r"(\d+)\.\d+\S*", text.strip())
    if status == HTTPStatus.OK and version is not None and int(version[1]) < _OLDEST_SERVER:
        # It tracks runs but does not support logged models, so packaging after training would fail.
        reason = f"the server runs MLflow {text.strip()}, which does not support logged models"
        raise UnavailableError(FIELD, uri, reason, f"upgrade the server to MLflow {_OLDEST_SERVER} or later")
    status, _, answer = _call(uri, "GET", f"{_API}/get-by-name", params={"experiment_name": experiment})
    if status == HTTPStatus.NOT_FOUND and answer.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        status, _, answer = _call(uri, "POST", f"{_API}/create", json={"name": experiment, "tags": [_PROJECT]})
        if answer.get("error_code") == "RESOURCE_ALREADY_EXISTS":
            return
    elif status == HTTPStatus.OK:
        found = answer["experiment"]
        if found.get("lifecycle_stage") == "deleted":
            raise _deleted(experiment, found["experiment_id"], uri)
        # The tag stays as it is: writing it shows whether these credentials may write.
        tag = next((each for each in found.get("tags", ()) if each["key"] == _PROJECT["key"]), _PROJECT)
        body = {"experiment_id": found["experiment_id"], **tag}
        status, _, answer = _call(uri, "POST", f"{_API}/set-experiment-tag", json=body)
    if status != HTTPStatus.OK:
        cause = refusal(uri, status, str(answer.get("message", "")), is_mlflow="error_code" in answer)
        raise UnavailableError(FIELD, uri, *cause)


def _call(uri: str, method: str, path: str, **arguments: Any) -> tuple[int, str, dict[str, Any]]:
    """Status, text and JSON of a request with MLflow's credentials and TLS settings, but without its retries."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    host = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    options = {"max_retries": 0, "timeout": _CHECK_TIMEOUT_SECONDS, "raise_on_status": False, **arguments}
    try:
        response = http_request(host, path, method, **options)  # type: ignore[no-untyped-call]
    except (MlflowException, OSError) as error:
        raise UnavailableError(FIELD, uri, *connection_cause(uri, error)) from error
    try:
        answer = json.loads(response.text)
    except ValueError:
        answer = {"message": response.text}
    return response.status_code, response.text, answer if isinstance(answer, dict) else {}


def _deleted(name: str, experiment: str, uri: str) -> UnavailableError:
    command = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {experiment}"
    remedy = f"restore it with: {command}, or choose another name"
    return UnavailableError("tracking.experiment", name, "this experiment is deleted", remedy)


def _has_tables(path: Path) -> bool:
    """Whether MLflow's last migration has run: it creates the default experiment in one transaction at the end."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=20)) as database:
        return bool(database.execute("SELECT count(*) FROM experiments").fetchone()[0])
    return False
