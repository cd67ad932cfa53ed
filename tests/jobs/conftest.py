"""A job run in the test's own process."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tla_service.job import run_job

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run_in_process(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    template: Path,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run the job that the test's module names as JOB, in a folder with an empty store; Ray must not be started.

    What it returns takes the command line, and variables of the environment by name; it gives exit code and messages.
    """
    import ray

    job = importlib.import_module(f"jobs.{request.module.JOB}")
    monkeypatch.chdir(tmp_path)
    shutil.copy(template, tmp_path / "mlflow.db")
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(ray, "init", fail)

    def call(*arguments: str, **environment: str) -> tuple[int, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [f"{request.module.JOB}.py", *arguments])
        code = run_job(job.main)
        return code, capsys.readouterr().err

    return call
