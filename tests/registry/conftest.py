"""A tracking server for the session, and a store of its own for every test."""

import os
from collections.abc import Iterator

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


@pytest.fixture
def packaged(local_uri: str) -> Packaged:
    return Packaged(local_uri)
