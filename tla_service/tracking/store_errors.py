"""What an error of a tracking store means, and what helps: each cause has a remedy of its own."""

import contextlib
import importlib.util
import os
import re
import sqlite3
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

LOCK_SECONDS = 20
START_ONE = "start one with `mlflow server`, correct the address, or leave tracking.uri out to use a local SQLite file"
_OTHER_PATH = "give a path that can be written"
_SQLITE_START = b"SQLite format 3\0"


class Cause(NamedTuple):
    """Why a store cannot be used, and what to do about it."""

    reason: str
    remedy: str


# What SQLite calls its errors; extended codes begin alike.
_SQLITE_CODES = {
    "SQLITE_BUSY": Cause(
        f"another process has held it locked for {LOCK_SECONDS} seconds", "wait until that process is done, or end it"
    ),
    "SQLITE_NOTADB": Cause("it is no SQLite database", "move the file away, or give another path"),
    "SQLITE_CORRUPT": Cause("it is damaged", "restore it from a backup, or move it away to begin a new one"),
    "SQLITE_READONLY": Cause("it is read-only", "let this user write the file and its folder, or give another path"),
    "SQLITE_CANTOPEN": Cause("unable to open the file", _OTHER_PATH),
    "SQLITE_FULL": Cause("its disk is full", "free some space, or give a path on another disk"),
    "SQLITE_IOERR": Cause("its disk does not answer", "give a path on a local disk"),
}
_DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "psycopg[binary]", "MySQLdb": "mysqlclient"}
# Words in the errors of servers and their drivers; the first that is found counts.
_DATABASE_WORDS = (
    (
        "password authentication failed",
        Cause("the credentials are refused", "correct name and password in the address"),
    ),
    ("Access denied for user", Cause("the credentials are refused", "correct name and password in the address")),
    ("does not exist", Cause("there is no such database", "create it, or correct the address")),
    ("Unknown database", Cause("there is no such database", "create it, or correct the address")),
    ("Connection refused", Cause("connection refused", "start the database server, or correct the address")),
    ("could not translate host name", Cause("unknown host name", "correct the address")),
    ("imed out", Cause("timed out", "see that the database server is up and can be reached")),
)
_CONNECTION_WORDS = (
    ("Connection refused", Cause("connection refused", START_ONE)),
    ("Name or service not known", Cause("unknown host name", "correct the address")),
    ("No address associated", Cause("unknown host name", "correct the address")),
    ("Temporary failure in name resolution", Cause("host name cannot be resolved", "correct the address, or DNS")),
    ("imed out", Cause("timed out", "see that the server is up, and that no firewall lies between")),
    ("CERTIFICATE_VERIFY_FAILED", Cause("its TLS certificate is not trusted", "set MLFLOW_TRACKING_SERVER_CERT_PATH")),
    ("WRONG_VERSION_NUMBER", Cause("it does not speak TLS", "write http:// in place of https://")),
    ("Invalid URL", Cause("not a valid address", "write http://HOST:PORT")),
    ("Invalid url", Cause("not a valid address", "write http://HOST:PORT")),
)  # fmt: skip


def shown(uri: str) -> str:
    """An address without its password, for messages."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def sqlite_cause(path: Path) -> Cause | None:
    """Why an SQLite file cannot be written; None if it can, or if it is not there yet.

    MLflow itself tries for minutes, prints what it tries, and names no cause.
    """
    if path.is_dir():
        return Cause("it is a folder", f"give a file in it, such as {path / 'mlflow.db'}")
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open("rb") as file:
        if file.read(len(_SQLITE_START)) != _SQLITE_START:
            return _SQLITE_CODES["SQLITE_NOTADB"]
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "")
        known = next((cause for name, cause in _SQLITE_CODES.items() if code.startswith(name)), None)
        return known or Cause(str(error), _OTHER_PATH)
    return None


def database_cause(uri: str, error: Exception) -> Cause:
    """What an error of MLflow on a database means.

    Args:
        uri: The store.
        error: What MLflow raised.
    """
    text = " ".join(str(error).split())
    schema = re.search(r"schema \(found version (\w+)", text)
    if schema is not None:
        return _schema_cause(uri, schema[1])
    if isinstance(error, ImportError):
        package = _DRIVERS.get(error.name or "", error.name)
        return Cause(f"its driver {error.name} is not installed", f"pip install '{package}'")
    if "unsupported URI" in text or "Could not parse SQLAlchemy URL" in text:
        return Cause("no address of a tracking store", "write http://HOST:PORT, or sqlite:////FOLDER/mlflow.db")
    if isinstance(error, OSError):
        return Cause(f"cannot be opened and written ({(error.strerror or text).lower()})", _OTHER_PATH)
    found = next((cause for words, cause in _DATABASE_WORDS if words in text), None)
    return found or Cause(f"cannot be opened and written ({text[:200]})", "see what the store's log says")


def _schema_cause(uri: str, revision: str) -> Cause:
    """An older or a newer schema: MLflow upgrades the one and cannot read the other."""
    home = importlib.util.find_spec("mlflow.store.db_migrations")
    folders = list(home.submodule_search_locations or ()) if home is not None else []
    if any(next(Path(folder, "versions").glob(f"{revision}_*.py"), None) for folder in folders):
        return Cause(
            f"an older MLflow made its tables (schema {revision})", f"back it up, then run: mlflow db upgrade {uri}"
        )
    reason = f"a newer MLflow made its tables (schema {revision})"
    return Cause(reason, "install that MLflow (pip install -U mlflow), or give another store")


def connection_cause(uri: str, error: BaseException) -> Cause:
    """What an error on the way to a server means."""
    text = " ".join(str(error).split())
    cause = next((cause for words, cause in _CONNECTION_WORDS if words in text), None)
    cause = cause or Cause(text[-200:], START_ONE)
    return proxied(uri, cause.reason) or Cause(f"no server answers ({cause.reason})", cause.remedy)


def proxied(uri: str, reason: str) -> Cause | None:
    """The same for a request that went through a proxy; None if there is none for this address."""
    import requests

    proxy = requests.utils.select_proxy(uri, requests.utils.get_environ_proxies(uri))
    if not proxy:
        return None
    parts = urllib.parse.urlsplit(uri)
    names = (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    variable = next((name for name in names if os.environ.get(name)), "the proxy settings")
    words = f"not reached through the proxy {shown(proxy)} ({reason})"
    return Cause(words, f"add {parts.hostname} to NO_PROXY if it needs no proxy, or correct {variable}")


def refusal(uri: str, status: int, message: str, *, is_mlflow: bool) -> Cause:
    """What an HTTP status that is no success means.

    Args:
        uri: The store.
        status: Of the answer.
        message: MLflow's, or the answer's text.
        is_mlflow: Whether the answer has the form of MLflow's.
    """
    if status == HTTPStatus.UNAUTHORIZED:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return Cause("the server refuses the credentials", remedy)
    if status == HTTPStatus.FORBIDDEN and "Invalid Host header" in message:
        remedy = "start the server with --allowed-hosts naming this host with and without the port"
        return Cause("the server refuses this host name (403 Invalid Host header)", remedy)
    text = " ".join(message.split())[:200]
    through = None if is_mlflow else proxied(uri, f"status {status}, {text}")
    if through is not None:
        return through
    if status == HTTPStatus.FORBIDDEN:
        remedy = "ask for EDIT permission, or choose another tracking.experiment"
        return Cause("these credentials may not write here (403)", remedy)
    if status == HTTPStatus.NOT_FOUND:
        return Cause("something answers, but not an MLflow server (404)", "correct the address")
    remedy = "look into the server's log" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "correct what it names"
    return Cause(f"the server answers with status {status} ({text})", remedy)


def artifact_cause(location: str, error: Exception) -> Cause:
    """What an error in storing files means.

    Args:
        location: Where the run's files go, as the tracking store says.
        error: What storing raised.
    """
    text = " ".join(str(error).split())[:200]
    reason = f"files cannot be stored at {location} ({text})"
    if isinstance(error, OSError) and "://" not in location.removeprefix("file://"):
        remedy = (
            "let this user write there; if it is a folder of the tracking server, start that with --serve-artifacts"
        )
        return Cause(reason, remedy)
    if isinstance(error, ImportError):
        return Cause(reason, f"pip install {error.name}")
    if re.search("credentials|AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch", text):
        remedy = "give credentials that may write there, or start the tracking server with --serve-artifacts"
        return Cause(reason, remedy)
    if "NoSuchBucket" in text:
        return Cause(reason, "create the bucket, or correct the server's --artifacts-destination")
    return Cause(reason, "look into the tracking server's log, and at its --artifacts-destination")
