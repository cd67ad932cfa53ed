"""Maps errors of a tracking store to their cause and a remedy for it."""

import contextlib
import importlib.util
import os
import re
import sqlite3
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from tla_service.errors import one_line

LOCK_SECONDS = 20
_START_ONE = "start one with `mlflow server`, correct the address, or omit tracking.uri to use a local SQLite file"
_OTHER_PATH = "give a writable path"
_CORRECT = "correct the address"
_SQLITE_START = b"SQLite format 3\0"


class Cause(NamedTuple):
    """Why a store cannot be used, and what to do about it."""

    reason: str
    remedy: str


# By SQLite's error names; extended codes start with them.
_SQLITE_CODES = {
    "SQLITE_BUSY": (f"locked by another process for {LOCK_SECONDS} seconds", "wait for that process, or end it"),
    "SQLITE_NOTADB": ("not an SQLite database", "move the file away, or give another path"),
    "SQLITE_CORRUPT": ("the database is damaged", "restore it from a backup, or move it away to start a new one"),
    "SQLITE_READONLY": ("read-only", "make the file and its folder writable for this user, or give another path"),
    "SQLITE_CANTOPEN": ("unable to open the file", _OTHER_PATH),
    "SQLITE_FULL": ("the disk is full", "free some space, or give a path on another disk"),
    "SQLITE_IOERR": ("disk I/O error", "give a path on a local disk"),
}
_DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "psycopg[binary]", "MySQLdb": "mysqlclient"}
# Patterns in the errors of servers and drivers; the first match wins.
_DATABASE_ERRORS = {
    "password authentication failed|Access denied for user": (
        "the credentials are refused", "correct user name and password in the address"
    ),
    "does not exist|Unknown database": ("the database does not exist", "create it, or correct the address"),
    "Connection refused": ("connection refused", "start the database server, or correct the address"),
    "could not translate host name": ("unknown host name", _CORRECT),
    "imed out": ("timed out", "check that the database server is up and reachable"),
}  # fmt: skip
_CONNECTION_ERRORS = {
    "Connection refused": ("connection refused", _START_ONE),
    "Name or service not known|No address associated": ("unknown host name", _CORRECT),
    "Temporary failure in name resolution": ("host name cannot be resolved", "correct the address, or DNS"),
    "imed out": ("timed out", "check that the server is up and that no firewall blocks it"),
    "CERTIFICATE_VERIFY_FAILED": ("its TLS certificate is not trusted", "set MLFLOW_TRACKING_SERVER_CERT_PATH"),
    "WRONG_VERSION_NUMBER": ("the server does not use TLS", "write http:// instead of https://"),
    "(?i:invalid url)": ("not a valid address", "write http://HOST:PORT"),
}


def sqlite_cause(path: Path) -> Cause | None:
    """Why an SQLite file cannot be written, if so: MLflow would retry for minutes and name no cause."""
    if path.is_dir():
        return Cause("it is a folder", f"give a file in it, such as {path / 'mlflow.db'}")
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open("rb") as file:
        if file.read(len(_SQLITE_START)) != _SQLITE_START:
            return Cause(*_SQLITE_CODES["SQLITE_NOTADB"])
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        return _known(_SQLITE_CODES, getattr(error, "sqlite_errorname", "")) or Cause(str(error), _OTHER_PATH)
    return None


def database_cause(uri: str, error: Exception) -> Cause:
    """The cause of an error that MLflow raised while opening a database."""
    text = one_line(error, 1000)
    schema = re.search(r"schema \(found version (\w+)", text)
    if schema is not None:
        # MLflow upgrades an older schema, and cannot read a newer one.
        home = importlib.util.find_spec("mlflow.store.db_migrations")
        folders = list(home.submodule_search_locations or ()) if home is not None else []
        if any(next(Path(folder, "versions").glob(f"{schema[1]}_*.py"), None) for folder in folders):
            reason = f"its tables were created by an older MLflow (schema {schema[1]})"
            return Cause(reason, f"back it up, then run: mlflow db upgrade {uri}")
        reason = f"its tables were created by a newer MLflow (schema {schema[1]})"
        return Cause(reason, "install that MLflow (pip install -U mlflow), or use another store")
    if isinstance(error, ImportError):
        package = _DRIVERS.get(error.name or "", error.name)
        return Cause(f"the driver {error.name} is not installed", f"pip install '{package}'")
    if "unsupported URI" in text or "Could not parse SQLAlchemy URL" in text:
        return Cause("not the address of a tracking store", "write http://HOST:PORT, or sqlite:////FOLDER/mlflow.db")
    if isinstance(error, OSError):
        return Cause(f"cannot be opened for writing ({(error.strerror or text).lower()})", _OTHER_PATH)
    found = _known(_DATABASE_ERRORS, text)
    return found or Cause(f"cannot be opened for writing ({text[:200]})", "see the log of the store")


def _known(causes: dict[str, tuple[str, str]], text: str) -> Cause | None:
    return next((Cause(*cause) for pattern, cause in causes.items() if re.search(pattern, text)), None)


def connection_cause(uri: str, error: BaseException) -> Cause:
    """The cause of an error on the way to a server."""
    text = one_line(error, 1000)
    cause = _known(_CONNECTION_ERRORS, text) or Cause(text[-200:], _START_ONE)
    return _proxied(uri, cause.reason) or Cause(f"no server answers ({cause.reason})", cause.remedy)


def _proxied(uri: str, reason: str) -> Cause | None:
    """The cause, if requests to this address go through a proxy."""
    import requests

    proxy = requests.utils.select_proxy(uri, requests.utils.get_environ_proxies(uri))
    if not proxy:
        return None
    parts = urllib.parse.urlsplit(uri)
    names = (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    variable = next((name for name in names if os.environ.get(name)), "the proxy settings")
    remedy = f"add {parts.hostname} to NO_PROXY if it needs no proxy, or correct {variable}"
    return Cause(f"not reachable through the proxy {proxy} ({reason})", remedy)


def refusal(uri: str, status: int, message: str, *, is_mlflow: bool) -> Cause:
    """The cause of an HTTP error status; `is_mlflow`: whether the response has MLflow's format."""
    if status == HTTPStatus.UNAUTHORIZED:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return Cause("the server refuses the credentials", remedy)
    if status == HTTPStatus.FORBIDDEN and "Invalid Host header" in message:
        remedy = "start the server with --allowed-hosts naming this host with and without the port"
        return Cause("the server refuses this host name (403 Invalid Host header)", remedy)
    text = " ".join(message.split())[:200]
    through = None if is_mlflow else _proxied(uri, f"status {status}, {text}")
    if through is not None:
        return through
    if status == HTTPStatus.FORBIDDEN:
        remedy = "ask for EDIT permission, or choose another tracking.experiment"
        return Cause("these credentials do not permit writing (403)", remedy)
    if status == HTTPStatus.NOT_FOUND:
        return Cause("not an MLflow server (404)", _CORRECT)
    remedy = "see the log of the server" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "correct what it names"
    return Cause(f"the server responded with status {status} ({text})", remedy)


def artifact_cause(location: str, error: Exception) -> Cause:
    """The cause of an error that storing files at a run's artifact location raised."""
    text = one_line(error)
    remedy = "see the log of the tracking server, and check its --artifacts-destination"
    if isinstance(error, OSError) and "://" not in location.removeprefix("file://"):
        remedy = "make it writable for this user; if it is a folder of the tracking server, start that with "
        remedy += "--serve-artifacts"
    elif isinstance(error, ImportError):
        remedy = f"pip install {error.name}"
    elif re.search("credentials|AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch", text):
        remedy = "give credentials with write access, or start the tracking server with --serve-artifacts"
    elif "NoSuchBucket" in text:
        remedy = "create the bucket, or correct the server's --artifacts-destination"
    return Cause(f"files cannot be stored at {location} ({text})", remedy)
