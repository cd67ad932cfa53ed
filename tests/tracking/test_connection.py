"""Where runs go, and how soon and clearly a place that cannot take them is named."""

import http.server
import json
import multiprocessing
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, PERMISSION_DENIED, RESOURCE_ALREADY_EXISTS

from tests.conftest import S3Server
from tests.registry.tracking_server import TrackingServer
from tla_service import errors
from tla_service.config import TrackingConfig
from tla_service.errors import ConfigError, UnavailableError
from tla_service.tracking.connection import (
    check_tracking,
    client,
    is_passing,
    probe_tracking,
    retrying,
    storing,
    tracking_uri,
)


def test_uri_given_wins_over_environment_wins_over_local_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    assert tracking_uri(TrackingConfig()) == "http://server:5000"
    assert tracking_uri(TrackingConfig(uri="sqlite:///runs.db")) == f"sqlite:///{tmp_path}/runs.db"


def test_server_is_accepted_and_gets_the_experiment(server: TrackingServer) -> None:
    made = MlflowClient(server.uri)
    for project in ("tla-service", "another"):
        check_tracking(TrackingConfig(uri=server.uri, experiment="checked"))
        found = made.get_experiment_by_name("checked")
        assert found is not None
        assert found.tags["tla.project"] == project
        made.set_experiment_tag(found.experiment_id, "tla.project", "another")


def test_files_of_a_store_that_only_the_server_reaches(s3: S3Server, template: Path, tmp_path: Path) -> None:
    """MLflow's client would read them from the store itself; this one answers requests without a key with an error."""
    server = TrackingServer(tmp_path, files="s3://images/mlflow")
    shutil.copy(template, tmp_path / "server.db")
    server.start()
    try:
        assert probe_tracking(TrackingConfig(uri=server.uri)) < 60
    finally:
        server.kill()


def test_host_name_the_server_does_not_allow(server: TrackingServer) -> None:
    uri = server.uri.replace("127.0.0.1", "localhost")
    with pytest.raises(UnavailableError, match=r"Invalid Host header.*--allowed-hosts"):
        check_tracking(TrackingConfig(uri=uri))


def test_deleted_experiment_is_named(server: TrackingServer) -> None:
    client = MlflowClient(server.uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(UnavailableError, match=r"tracking.experiment=gone: this experiment is deleted"):
        check_tracking(TrackingConfig(uri=server.uri, experiment="gone"))


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(UnavailableError, match="connection refused"):
            check_tracking(TrackingConfig(uri=uri))
    assert time.monotonic() - start < 5


def test_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tla_service.tracking.connection._CHECK_TIMEOUT_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(UnavailableError, match="timed out"):
            check_tracking(TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert time.monotonic() - start < 10


@pytest.fixture
def answer() -> Iterator[dict[str, object]]:
    """An HTTP server that gives every request the same answer; it stands for what real servers answer rarely."""
    said: dict[str, object] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(str(said["status"])))
            self.end_headers()
            self.wfile.write(str(said["text"]).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        said["uri"] = f"http://127.0.0.1:{made.server_port}"
        yield said
        made.shutdown()


@pytest.mark.parametrize(
    ("status", "text", "match"),
    [
        (401, "You are not authenticated", "refuses the credentials; set MLFLOW_TRACKING_USERNAME"),
        (403, json.dumps({"message": "Permission denied"}), "do not permit writing"),
        (404, "<html>", "not an MLflow server"),
        (503, "busy", r"status 503 \(busy\)"),
    ],
)
def test_answers_that_are_no_success(answer: dict[str, object], status: int, text: str, match: str) -> None:
    answer.update(status=status, text=text)
    with pytest.raises(UnavailableError, match=match):
        check_tracking(TrackingConfig(uri=str(answer["uri"])))


@pytest.mark.parametrize(
    ("status", "text", "match"),
    [
        (401, "You are not authenticated", r"reading the run failed \(.*; set MLFLOW_TRACKING_USERNAME"),
        (403, "Permission denied", r"reading the run failed \(.*; ask for EDIT permission"),
        (403, "Invalid Host header", r"reading the run failed \(.*; start the server with --allowed-hosts"),
    ],
)
def test_a_refused_call_is_explained_by_the_credentials(
    answer: dict[str, object], status: int, text: str, match: str
) -> None:
    answer.update(status=status, text=text)
    made = client(str(answer["uri"]))
    with pytest.raises(UnavailableError, match=match):
        retrying("Reading the run", lambda: made.get_run("0" * 32))


def test_an_account_that_may_not_delete_runs_passes_the_checkup(
    local_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("Permission denied", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(MlflowClient, "delete_run", refuse)
    assert probe_tracking(TrackingConfig(uri=local_uri)) > 0


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns"])
def test_plain_folders_are_explained(uri: str) -> None:
    for question in (lambda: check_tracking(TrackingConfig(uri=uri)), lambda: client(uri)):
        with pytest.raises(ConfigError, match=r"no longer supports plain folders, such as .*mlruns; write sqlite"):
            question()


def test_sqlite_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"cannot be opened for writing.*give a writable path"):
        check_tracking(TrackingConfig(uri=f"sqlite:///{tmp_path}/file/mlflow.db"))


def test_sqlite_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(UnavailableError, match="cannot be opened for writing"):
        check_tracking(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))


def test_two_processes_make_the_same_store(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    both = [multiprocessing.get_context("fork").Process(target=check_tracking, args=(config,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(90)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("tla")
    assert experiment is not None
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()


def test_retrying_repeats_what_may_pass_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "time", Clock())
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("away")
        return "done"

    assert retrying("it", flaky) == "done"
    with pytest.raises(ValueError, match="no"):
        retrying("it", lambda: (_ for _ in ()).throw(ValueError("no")))


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("call", "shortest", "longest"), [(retrying, 10, 20), (storing, 240, 360)])
def test_questions_wait_seconds_for_a_server_and_results_wait_minutes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: Any, shortest: float, longest: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(errors, "time", clock)

    def away_until(back: float) -> str:
        if clock.now < back:
            raise ConnectionError("connection refused")
        return "done"

    assert call("Storing it", lambda: away_until(shortest)) == "done"
    assert "Storing it failed (connection refused); trying again in 1 s" in caplog.text
    clock.now = 0
    with pytest.raises(UnavailableError, match=r"storing it failed \(connection refused\); bring the server back"):
        call("Storing it", lambda: away_until(1e9))
    assert shortest < clock.now < longest


def test_a_first_time_out_is_repeated_though_it_takes_longer_than_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(errors, "time", clock)

    def busy_until(free: float) -> str:
        if clock.now < free:
            clock.now += 30
            raise TimeoutError("timed out")
        return "done"

    assert retrying("it", lambda: busy_until(20)) == "done"
    with pytest.raises(UnavailableError):
        retrying("it", lambda: busy_until(1e9))
    assert clock.now < 100


def test_errors_of_an_artifact_store_on_s3_may_pass() -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        options = Config(retries={"max_attempts": 0}, connect_timeout=1)
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        away = boto3.client("s3", endpoint_url=address, config=options, **keys)  # type: ignore[call-overload]
        with pytest.raises(Exception, match="Could not connect") as raised:
            away.list_buckets()
    assert is_passing(raised.value)

    def answered(status: int) -> Exception:
        return ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]

    def uploading(status: int) -> Exception:
        """What boto3 makes of an answer in the middle of an upload."""
        try:
            try:
                raise answered(status)
            except ClientError as error:
                raise boto3.exceptions.S3UploadFailedError(str(error))  # noqa: B904 - as boto3 does it
        except boto3.exceptions.S3UploadFailedError as error:
            return error

    assert is_passing(answered(503))
    assert is_passing(uploading(503))
    assert not is_passing(answered(403))
    assert not is_passing(uploading(403))


def test_a_tag_that_two_processes_add_at_once_may_pass() -> None:
    refused = "(sqlite3.IntegrityError) UNIQUE constraint failed: model_version_tags.key"
    assert is_passing(MlflowException(refused, error_code=BAD_REQUEST))
    assert not is_passing(MlflowException(refused, error_code=RESOURCE_ALREADY_EXISTS)), "a model of this name"
    assert not is_passing(MlflowException("bad value", error_code=BAD_REQUEST))


def test_mlflow_prints_no_address_when_a_run_ends(server: TrackingServer, capsys: pytest.CaptureFixture[str]) -> None:
    made = client(server.uri.replace("://", "://me:hunter2@"))
    made.set_terminated(made.create_run("0").info.run_id)
    assert "hunter2" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("status", "passes"), [(401, False), (403, False), (413, False), (408, True), (429, True), (502, True)]
)
def test_an_answer_of_the_artifact_proxy_passes_by_its_status(status: int, passes: bool) -> None:
    answer = requests.Response()
    answer.status_code = status
    assert is_passing(requests.HTTPError("refused", response=answer)) is passes
    assert is_passing(requests.ConnectionError("reset"))
