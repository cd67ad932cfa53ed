"""A tracking store that cannot be used: each cause is named, and its remedy is the one that helps."""

import re
import shlex
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.experiments import commands

from tests.registry.tracking_server import TrackingServer
from tla_service.config import RunConfig, TrackingConfig
from tla_service.errors import UnavailableError
from tla_service.registry.loading import load_model
from tla_service.tracking.connection import check_tracking
from tla_service.tracking.runs import open_run
from tla_service.tracking.store_errors import artifact_cause, database_cause


def refused(uri: str, experiment: str = "tla") -> UnavailableError:
    with pytest.raises(UnavailableError) as caught:
        check_tracking(TrackingConfig(uri=uri, experiment=experiment))
    assert "\n" not in str(caught.value)
    return caught.value


def with_schema(uri: str, revision: str) -> None:
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_an_older_schema_is_to_be_upgraded(local_uri: str) -> None:
    with_schema(local_uri, "acf3f17fdcc7")
    error = refused(local_uri)
    assert error.reason == "its tables were created by an older MLflow (schema acf3f17fdcc7)"
    assert error.remedy == f"back it up, then run: mlflow db upgrade {local_uri}"
    # Jobs that ask no server first say the same.
    with pytest.raises(UnavailableError, match="mlflow db upgrade"):
        load_model("models:/tla-digits/1", tracking=local_uri)


def test_a_newer_schema_cannot_be_upgraded(local_uri: str) -> None:
    with_schema(local_uri, "ffffffffffff")
    error = refused(local_uri)
    assert error.reason == "its tables were created by a newer MLflow (schema ffffffffffff)"
    assert "pip install -U mlflow" in error.remedy
    assert "upgrade sqlite" not in error.remedy


def test_a_deleted_experiment_comes_back_by_the_command_that_is_advised(
    local_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MlflowClient(local_uri)
    made.delete_experiment(made.create_experiment("gone"))
    advice = re.search(r"restore it with: (.*), or choose another name", refused(local_uri, "gone").remedy)
    assert advice is not None
    assert f"MLFLOW_TRACKING_URI={local_uri} mlflow experiments restore --experiment-id" in advice[1]
    variable, *arguments = shlex.split(advice[1])
    monkeypatch.setenv(*variable.split("=", 1))
    commands.main(arguments[2:], standalone_mode=False)
    check_tracking(TrackingConfig(uri=local_uri, experiment="gone"))


def test_files_that_are_no_database(tmp_path: Path, template: Path) -> None:
    content = template.read_bytes()
    cases = {
        "text": (b"not a database\n", "not an SQLite database", "move the file away"),
        "cut": (content[:5000], "the database is damaged", "restore it from a backup"),
        "garbled": (
            content[:4096] + b"\xff" * (len(content) - 4096),
            "the database is damaged",
            "restore it from a backup",
        ),
    }
    for name, (written, reason, remedy) in cases.items():
        (tmp_path / name).write_bytes(written)
        error = refused(f"sqlite:///{tmp_path}/{name}")
        assert error.reason == f"cannot be opened for writing ({reason})", name
        assert remedy in error.remedy, name
        assert (tmp_path / name).read_bytes() == written
    (tmp_path / "folder").mkdir()
    began = time.monotonic()
    error = refused(f"sqlite:///{tmp_path}/folder")
    assert (error.reason, error.remedy) == (
        "cannot be opened for writing (it is a folder)",
        f"give a file in it, such as {tmp_path}/folder/mlflow.db",
    )
    assert time.monotonic() - began < 10, "MLflow itself tries for minutes"


def test_a_locked_database_is_waited_for_and_named(
    local_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr("tla_service.tracking.store_errors.LOCK_SECONDS", 0.3)
    error = refused(local_uri)
    assert "locked by another process" in error.reason
    assert error.remedy == "wait for that process, or end it"
    monkeypatch.setattr("tla_service.tracking.store_errors.LOCK_SECONDS", 20)
    threading.Timer(0.3, holder.rollback).start()
    check_tracking(TrackingConfig(uri=local_uri))
    holder.close()


@pytest.mark.parametrize(
    ("uri", "reason", "remedy"),
    [
        ("mysql+pymysql://a:secret@127.0.0.1:1/x", "the driver pymysql is not installed", "pip install 'pymysql'"),
        ("foo://x", "not the address of a tracking store", "write http://HOST:PORT, or sqlite"),
        ("http://", "no server answers (not a valid address)", "write http://HOST:PORT"),
        ("http://no-such-host.invalid:5000", "no server answers (unknown host name)", "correct the address"),
        ("http://127.0.0.1:1", "no server answers (connection refused)", "start one with `mlflow server`"),
    ],
)
def test_addresses_that_cannot_be(monkeypatch: pytest.MonkeyPatch, uri: str, reason: str, remedy: str) -> None:
    error = refused(uri)
    if uri.startswith("http://no-such"):
        assert error.reason in (reason, "no server answers (host name cannot be resolved)")
    else:
        assert error.reason == reason
    assert error.remedy.startswith(remedy)
    assert "secret" not in str(error)


def test_errors_of_database_servers() -> None:
    for text, reason, remedy in [
        ('FATAL: password authentication failed for user "a"', "the credentials are refused", "correct user name and"),
        ('FATAL: database "x" does not exist', "the database does not exist", "create it"),
        ("could not translate host name", "unknown host name", "correct the address"),
        ("Connection refused\n\tIs the server running", "connection refused", "start the database server"),
    ]:
        cause = database_cause("postgresql://a:b@h/x", RuntimeError(text))
        assert cause.reason == reason
        assert cause.remedy.startswith(remedy)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_that_catches_the_server_s_address_is_named(
    server: TrackingServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "http://me:secret@127.0.0.1:1")
    error = refused(server.uri)
    assert error.reason == "not reachable through the proxy http://127.0.0.1:1 (connection refused)"
    assert error.remedy == f"add 127.0.0.1 to NO_PROXY if it needs no proxy, or correct {name}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    check_tracking(TrackingConfig(uri=server.uri))


def test_a_proxy_that_answers_in_the_server_s_place(server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any HTTP server that is no proxy will do: it answers for an address that is not its own."""
    for variable in ("http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HTTP_PROXY", server.uri)
    error = refused("http://mlflow.example:5000")
    assert "not reachable through the proxy" in error.reason or "Invalid Host header" in error.reason


def test_a_run_whose_files_cannot_be_stored_is_not_begun(local_uri: str, tmp_path: Path) -> None:
    made = MlflowClient(local_uri)
    (tmp_path / "file").write_text("")
    made.create_experiment("unwritable", artifact_location=f"file://{tmp_path}/file/artifacts")
    made.create_experiment("cloud", artifact_location="s3://bucket/prefix")
    config = RunConfig(tracking=TrackingConfig(uri=local_uri, experiment="unwritable"))
    began = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        open_run(config, "key", facts={})
    assert time.monotonic() - began < 10, "what does not pass is not repeated"
    assert f"files cannot be stored at file://{tmp_path}/file/artifacts" in caught.value.reason
    assert caught.value.remedy.startswith("make it writable for this user")


def test_causes_of_artifact_stores() -> None:
    for location, error, remedy in [
        ("s3://b/p", RuntimeError("Unable to locate credentials"), "give credentials with write access"),
        ("s3://b/p", RuntimeError("NoSuchBucket: no"), "create the bucket"),
        ("s3://b/p", ImportError("No module named 'boto3'", name="boto3"), "pip install boto3"),
        ("mlflow-artifacts:/1", RuntimeError("status 500"), "see the log of the tracking server"),
        (
            "/mlruns/1",
            PermissionError(13, "Permission denied", "/mlruns"),
            "make it writable for this user; if it is a folder",
        ),
    ]:
        assert artifact_cause(location, error).remedy.startswith(remedy)


def test_a_run_is_found_again_whatever_its_folder_is_called(local_uri: str) -> None:
    """The key of a run holds the path of its folder."""
    config = RunConfig(tracking=TrackingConfig(uri=local_uri))
    for key in ("/home/o'neil/a%b_c", '/home/"quoted"/a\\b', """/o'neil's "own" `été 1`/run"""):
        first = open_run(config, key, facts={})
        assert open_run(config, key, facts={}) == first, key
