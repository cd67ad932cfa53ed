"""Where runs are tracked, and whether that place can be reached and written: asked before anything is trained."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tla_service.config import TrackingConfig
from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.retries import retried
from tla_service.tracking.store_errors import connection_cause, database_cause, refusal, shown, sqlite_cause

if TYPE_CHECKING:
    from mlflow import MlflowClient

FIELD = "tracking.uri"
CHECK_TIMEOUT_SECONDS = 5
_REQUEST_TIMEOUT_SECONDS = 30
RETRY_SECONDS, RESULT_SECONDS = 16.0, 300.0
_SQLITE = "sqlite:///"
_OLDEST_SERVER = 3
_OF_FILES = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
_OF_DISKS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")


def tracking_uri(config: TrackingConfig) -> str:
    """The tracking store of a run, in a form that means the same in every process whatever its working folder.

    Args:
        config: ``uri`` wins over the environment's MLFLOW_TRACKING_URI; without both it is ``mlflow.db`` here.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"
    path = sqlite_path(uri)
    return uri.rstrip("/") if path is None else f"{_SQLITE}{path}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of the database file of an ``sqlite:///`` address; ``None`` for every other address."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE)).expanduser().absolute()


def client(uri: str) -> "MlflowClient":
    """An MLflow client of a store, which is made first if it is an SQLite file that does not exist yet.

    MLflow's own retries are silent and take four minutes, so they are turned off for this process, unless the
    environment sets them: what calls the server from here repeats itself, and says so. Progress bars go as well.

    Raises:
        UnavailableError: The address is none, or a database cannot be opened. A server is not asked yet.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_REQUEST_TIMEOUT_SECONDS))
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    try:
        if path is None or _has_tables(path):
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        _check_file(path)
        with exclusive(path), quiet("mlflow.store.db.utils", "alembic"):
            made = MlflowClient(tracking_uri=uri, registry_uri=uri)
            made.search_registered_models(max_results=1)  # opens the registry's half of the same file
            return made
    except UserError:
        raise
    except Exception as error:
        raise UnavailableError(FIELD, shown(uri), *database_cause(uri, error)) from error


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock beside an SQLite file: MLflow lets two processes that make the same tables crash each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def experiment_id(made: "MlflowClient", name: str, uri: str) -> str:
    """The id of an experiment, made at first use; beside an SQLite file its artifacts go to ``mlartifacts``."""
    from mlflow.exceptions import MlflowException

    found = made.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise _deleted(name, str(found.experiment_id), uri)
        return str(found.experiment_id)
    path = sqlite_path(uri)
    location = None if path is None else (path.parent / "mlartifacts").as_uri()
    try:
        return str(made.create_experiment(name, artifact_location=location))
    except MlflowException:
        # Another process made it between the question and the answer.
        found = made.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def retrying(
    what: str, action: Callable[[], T], *, seconds: float = RETRY_SECONDS, first_wait_seconds: float = 1.0
) -> T:
    """Call something that needs the server; repeat when it is away or busy, waiting twice as long each time.

    Args:
        what: What is done, for messages.
        action: The call.
        seconds: How long to keep trying.
        first_wait_seconds: Wait before the second attempt.

    Raises:
        UnavailableError: It was away or busy all the time.
        Exception: What the call raised, at once, when the server is there and says no.
    """
    try:
        return retried(what, action, is_passing, seconds=seconds, first_wait_seconds=first_wait_seconds)
    except Exception as error:
        if not is_passing(error):
            raise
        reason = f"{what[0].lower()}{what[1:]} failed ({one_line(error)})"
        remedy = "bring the server back and give the same command again: what is done is not repeated"
        raise UnavailableError("MLflow", None, reason, remedy) from error


def storing(what: str, action: Callable[[], T]) -> T:
    """As `retrying`, for `RESULT_SECONDS`: hours of work must not be lost to a server that restarts."""
    return retrying(what, action, seconds=RESULT_SECONDS)


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed later: the server is away, overloaded, or its database is locked."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return str(error.error_code) in {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
    if isinstance(error, OSError):  # requests' errors are OSErrors; those of this machine's files do not pass
        return not isinstance(error, _OF_FILES) and error.errno not in _OF_DISKS
    # Artifacts on S3: boto's errors of the connection, or with the answer, which an upload's error was raised from.
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "botocore.exceptions"}
    answer = getattr(error, "response", None) or getattr(error.__context__, "response", None) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(answer, dict) else 0
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or bool(names & {"HTTPClientError", "ConnectionError"})


def one_line(error: BaseException, limit: int = 200) -> str:
    """An error's text without line breaks, cut to ``limit`` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_tracking(config: TrackingConfig) -> None:
    """Find out within seconds whether runs can be tracked; makes the experiment if it is not there.

    Raises:
        ConfigError: The address can never work.
        UnavailableError: The store cannot be reached or written now.
    """
    uri = tracking_uri(config)
    scheme = uri.partition(":")[0] if ":" in uri else "file"
    if scheme in ("http", "https"):
        _check_server(uri, config.experiment)
        return
    if scheme == "file" and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() != "true":
        remedy = "write sqlite:////folder/mlflow.db, or the http:// address of a server"
        raise ConfigError(FIELD, uri, "MLflow 3 no longer keeps runs in plain folders", remedy)
    path = sqlite_path(uri)
    try:
        if path is not None:
            _check_file(path)
        made = client(uri)
        tag = made.get_experiment(experiment_id(made, config.experiment, uri)).tags.get("tla.project", "tla-service")
        made.set_experiment_tag(experiment_id(made, config.experiment, uri), "tla.project", tag)
    except UserError:
        raise
    except Exception as error:
        raise UnavailableError(FIELD, shown(uri), *database_cause(uri, error)) from error


def _check_file(path: Path) -> None:
    with exclusive(path):  # not while another process makes the tables
        cause = sqlite_cause(path)
    if cause is not None:
        reason = f"cannot be opened and written ({cause.reason})"
        raise UnavailableError(FIELD, f"{_SQLITE}{path}", reason, cause.remedy)


def _check_server(uri: str, experiment: str) -> None:
    _check_version(uri)
    status, answer = _call(uri, "GET", "experiments/get-by-name", params={"experiment_name": experiment})
    if status == HTTPStatus.NOT_FOUND and answer.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        status, answer = _call(uri, "POST", "experiments/create", json={"name": experiment})
        if status == HTTPStatus.OK or answer.get("error_code") == "RESOURCE_ALREADY_EXISTS":
            return
    elif status == HTTPStatus.OK:
        found = answer["experiment"]
        if found.get("lifecycle_stage") == "deleted":
            raise _deleted(experiment, found["experiment_id"], uri)
        body = {"experiment_id": found["experiment_id"], "key": "tla.project", "value": "tla-service"}
        status, answer = _call(uri, "POST", "experiments/set-experiment-tag", json=body)
        if status == HTTPStatus.OK:
            return
    is_mlflow = "error_code" in answer
    raise UnavailableError(
        FIELD, shown(uri), *refusal(uri, status, str(answer.get("message", "")), is_mlflow=is_mlflow)
    )


def _call(uri: str, method: str, endpoint: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
    """One request with MLflow's credentials and TLS settings, but without its minutes of retries."""
    status, text = _request(uri, method, f"/api/2.0/mlflow/{endpoint}", **arguments)
    try:
        answer = json.loads(text)
    except ValueError:
        answer = {"message": text}
    return status, answer if isinstance(answer, dict) else {}


def _check_version(uri: str) -> None:
    """Refuse a server that tracks runs but knows no logged models: it would fail when training is over."""
    status, text = _request(uri, "GET", "/version")
    found = re.fullmatch(r"(\d+)\.\d+\S*", text.strip())
    if status == HTTPStatus.OK and found is not None and int(found[1]) < _OLDEST_SERVER:
        reason = f"the server runs MLflow {text.strip()}, which cannot store packaged models as this project does"
        raise UnavailableError(FIELD, shown(uri), reason, f"upgrade the server to MLflow {_OLDEST_SERVER} or later")


def _request(uri: str, method: str, path: str, **arguments: Any) -> tuple[int, str]:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        response = http_request(  # type: ignore[no-untyped-call]
            get_default_host_creds(uri),  # type: ignore[no-untyped-call]
            path,
            method,
            max_retries=0,
            timeout=CHECK_TIMEOUT_SECONDS,
            raise_on_status=False,
            **arguments,
        )
    except (MlflowException, OSError) as error:
        raise UnavailableError(FIELD, shown(uri), *connection_cause(uri, error)) from error
    return response.status_code, response.text


def _deleted(name: str, experiment: str, uri: str) -> UnavailableError:
    command = f"MLFLOW_TRACKING_URI={shown(uri)} mlflow experiments restore --experiment-id {experiment}"
    remedy = f"restore it with: {command}, or choose another name"
    return UnavailableError("tracking.experiment", name, "this experiment is deleted", remedy)


def _has_tables(path: Path) -> bool:
    """Whether MLflow's last migration has run. It writes its version at the end, in one transaction."""
    import sqlite3

    if not path.is_file() or path.stat().st_size == 0:
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=20)) as database:
        return bool(database.execute("SELECT count(*) FROM experiments").fetchone()[0])
    return False


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep the lines about table migrations off the terminal."""
    before = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
