"""A network that MLflow holds, as new for every test."""

import contextlib
import copy
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from tests.registry.tracking_server import Packaged


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test, and no usage report leaves it."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def packaged_once(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """A network in a store, which `packaged` restores: making both takes a second."""
    folder = tmp_path_factory.mktemp("packaged")
    (folder / "store").mkdir()
    shutil.copy(template, folder / "store" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        made = Packaged(f"sqlite:///{folder}/store/mlflow.db")
    shutil.copytree(folder / "store", folder / "kept")
    return made


@pytest.fixture
def packaged(packaged_once: Packaged) -> Packaged:
    """The network in its store, as if no test had changed them."""
    store = Path(packaged_once.uri.removeprefix("sqlite:///")).parent
    kept = store.with_name("kept")
    for folder in [path for path in store.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    shutil.copytree(kept, store, dirs_exist_ok=True, ignore=shutil.ignore_patterns("mlflow.db*"))
    # Not by a copy of the file, which MLflow keeps open.
    with contextlib.closing(sqlite3.connect(kept / "mlflow.db")) as source:
        with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as target:
            target.execute("PRAGMA synchronous=OFF")
            source.backup(target)
    return copy.deepcopy(packaged_once)
