"""One thread, one seed, no configuration from outside; servers of S3 and MLflow, and a store, for tests that ask."""

import contextlib
import gc
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from tests.registry.tracking_server import TrackingServer

# Timings on a shared machine are no reason to fail; random cases are drawn afresh for every run.
settings.register_profile("tla", deadline=None)
settings.load_profile("tla")
torch.set_num_threads(1)
gc.disable()  # until all tests are collected: it would find nothing but modules

S3_START_SECONDS = 60  # 1 on an idle machine


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, collect only files with such tests: the others import packages that a GPU machine may lack."""
    if config.option.markexpr != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return not any("mark.gpu" in file.read_text() for file in files) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the jobs' tests first: with two processes the longest file must not be the last to start."""
    items.sort(key=lambda item: "tests/jobs" not in str(item.path))


def pytest_collection_finish() -> None:
    """Leave what was imported to no garbage collection: each would take half a second, also in forked processes."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("TLA_")]:
        monkeypatch.delenv(variable)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass(frozen=True)
class S3Server:
    """A running S3 server: the environment of its clients, and a client that bypasses the code under test."""

    environment: dict[str, str]
    bucket: str
    client: Any

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body)


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """A server in a process of its own."""
    ready = folder / "environment"
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(ready), "--bucket", "images"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + S3_START_SECONDS
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the S3 server did not start: {(folder / 'log').read_text()}")
                time.sleep(0.05)
            environment = dict(line.split("=", 1) for line in ready.read_text().splitlines())
            import boto3

            client = boto3.client(
                "s3",
                endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
                aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
                region_name=environment["AWS_DEFAULT_REGION"],
            )
            yield S3Server(environment, "images", client)
            client.close()
        finally:
            process.kill()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for the session."""
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its address and keys, and no others, in this test's environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**s3_server.environment, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> None:
    """SQLite stores of this process need not survive a power failure."""
    try:
        from sqlalchemy import event
        from sqlalchemy.engine import Engine
    except ImportError:  # on a GPU machine
        return

    @event.listens_for(Engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        with contextlib.suppress(sqlite3.DatabaseError):  # it is no database, or locked: the next statement says so
            connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store of MLflow whose tables exist: making them takes seconds, copying the file takes none."""
    from tla_service.tracking.connection import client

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    client(f"sqlite:///{path}")
    return path


@pytest.fixture
def local_uri(template: Path, tmp_path: Path) -> str:
    """A store of the test's own."""
    path = tmp_path / "mlflow.db"
    path.write_bytes(template.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def server(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["TrackingServer"]:
    """A tracking server for the session."""
    from tests.registry.tracking_server import TrackingServer

    made = TrackingServer(tmp_path_factory.mktemp("server"))
    shutil.copy(template, made.folder / "server.db")
    made.start()
    yield made
    made.kill()
