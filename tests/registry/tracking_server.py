"""What these tests share: a real tracking server, and a small network that MLflow holds."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mlflow import MlflowClient

from tests.conftest import free_port
from tla_service.config import RunConfig
from tla_service.evaluation.detection import fit_detector
from tla_service.evaluation.embedding import Embedded
from tla_service.inference.detector import Rejector
from tla_service.models import build_model
from tla_service.registry.packaging import log_model
from tla_service.tracking.runs import open_run

START_SECONDS = 240  # 10 on an idle machine


class TrackingServer:
    """`mlflow server` on a port of its own; started, killed and started again over the same database."""

    def __init__(self, folder: Path, store: str = "", allowed: str = "", files: str = "") -> None:
        self.folder, self.store = folder, store or f"sqlite:///{folder}/server.db"
        self.files = files or str(folder / "store")
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.allowed = allowed or "127.0.0.1:*"  # the server's port, and those of gates to it
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--port",
            str(self.port),
            "--workers",
            "1",
            "--backend-store-uri",
            self.store,
            "--artifacts-destination",
            self.files,
            "--allowed-hosts",
            self.allowed,
        ]
        with (self.folder / "server.log").open("ab") as log:
            # The job runner takes seconds to start and serves features that nothing here uses.
            variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=variables)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        self.kill()
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """End the server and its worker at once, as a crash would."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def config_for(uri: str, **changes: object) -> RunConfig:
    return RunConfig.model_validate({"tracking": {"uri": uri}, **changes})


def images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).random((count, 1, 8, 8), dtype=np.float32)


class Logged(NamedTuple):
    """What MLflow made of a network; `version` is None where it is not registered."""

    model_uri: str
    version: str | None
    model_id: str


class Packaged:
    """A network, and what MLflow made of it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.config = config_for(uri, attack={"epsilon": 0.15, "step_size": 0.05})
        self.run_id = open_run(self.config, "key-1", facts={"data_fingerprint": "f00d"})
        torch.manual_seed(0)
        self.network = build_model("digits_cnn", 10, (1, 8, 8)).eval()
        self.rejector = self._fitted()
        self.model = self.log()

    def _fitted(self) -> Rejector:
        """A detector of images like `images()`, with a threshold that rejects half of them."""
        with torch.inference_mode():
            output = self.network(torch.from_numpy(images(200)))
        seen = Embedded(output.embeddings.numpy(), output.logits.numpy(), np.arange(200) % 10)
        detector = fit_detector(seen, covariance="tied")
        return Rejector(detector, float(np.median(detector.score(seen.embeddings, seen.predictions))), 0.5, 200, 200)

    def log(self, registered_model: str | None = "tla-digits", **changes: object) -> Logged:
        arguments = {
            "state_dict": self.network.state_dict(),
            "config": self.config,
            "class_names": [f"digit {i}" for i in range(10)],
            "image_shape": (1, 8, 8),
            "example": images(),
            "metrics": {"clean_accuracy": 0.9, "robust_accuracy/pgd20": 0.75},
            "facts": {"data_fingerprint": "f00d", "train_images": "1000"},
            "rejector": self.rejector,
        }
        uri = log_model(self.uri, self.run_id, registered_model=registered_model, **(arguments | changes))  # type: ignore[arg-type]
        if registered_model is None:
            return Logged(uri, None, uri.removeprefix("models:/"))
        version = uri.rpartition("/")[2]
        found = MlflowClient(self.uri).get_model_version(registered_model, version)
        return Logged(uri, version, found.tags["model_id"])

    def logits(self, batch: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return self.network(torch.from_numpy(batch)).logits
