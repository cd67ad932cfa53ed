"""A tracking server for the session, and a store of its own for every test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.registry.tracking_server import Packaged, TrackingServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    made = TrackingServer(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test, and no usage report leaves it."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store whose tables exist: making them takes seconds, copying the file takes none."""
    from tla_service.registry.connection import client

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    client(f"sqlite:///{path}")
    return path


@pytest.fixture
def local_uri(template: Path, tmp_path: Path) -> str:
    path = tmp_path / "mlflow.db"
    path.write_bytes(template.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture
def packaged(local_uri: str) -> Packaged:
    return Packaged(local_uri)
