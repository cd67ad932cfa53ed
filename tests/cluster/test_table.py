"""A table on a real Ray cluster: runs on workers that share no folder with the driver, one of which is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROOT
from tla_service.cluster.table import files_for, write_files
from tla_service.results.places import Work
from tla_service.training.checkpoint import verify_checkpoint

FLAGS = "--table digits --budget 2 --seeds 1 --methods at tla --no-pools --scaling.address local"


def test_a_worker_gets_its_run_and_of_the_surrogate_the_weights(tmp_path: Path) -> None:
    for name in ("tla-s0", "tla-s1", "at-s0"):
        for file in ("config.yaml", "log.jsonl", "checkpoints/000004/best.safetensors", "checkpoints/000004/.partial",
                     "checkpoints/.000005-x/best.safetensors"):  # fmt: skip
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} {file}")
    files = dict(files_for(Work("tla-s0", "measure", "tla-s1"), tmp_path))
    assert set(files) == {
        "tla-s0/config.yaml", "tla-s0/log.jsonl", "tla-s0/checkpoints/000004/best.safetensors",
        "tla-s1/config.yaml", "tla-s1/checkpoints/000004/best.safetensors",
    }  # fmt: skip
    write_files(tmp_path / "there", files)
    for name, content in files.items():
        assert (tmp_path / "there" / name).read_bytes() == content


def table(folder: Path) -> "subprocess.Popen[str]":
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TLA_", "RAY_", "MLFLOW_"))}
    variables |= {"RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "jobs" / "reproduce_paper.py"), *FLAGS.split()]
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def worker_of(driver: int, module: str, seconds: float = 240) -> psutil.Process:
    """The Ray worker, below the driver, that has a process of a module."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in psutil.Process(driver).children(recursive=True):
            with_it = process.is_running() and module in process.cmdline()
            if with_it and "ray::" in "".join(process.parent().cmdline()):
                return process.parent()
        time.sleep(0.1)
    raise TimeoutError(f"no worker runs {module}")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_its_work_and_a_stopped_table_goes_on(tmp_path: Path) -> None:
    first = table(tmp_path)
    worker_of(first.pid, "tla_service.training").kill()
    state = tmp_path / "runs" / "tables" / "digits-2-minutes"
    while first.poll() is None and not list(state.glob("*/summary.json")):
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    printed, _ = first.communicate(timeout=300)
    assert "lost its worker; it goes on elsewhere" in printed
    assert first.returncode in (0, 130), printed
    for manifest in state.glob("*/checkpoints/*/manifest.json"):
        verify_checkpoint(manifest.parent)

    second = table(tmp_path)
    printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0, printed
    for name in ("at-s0", "tla-s0"):
        found = json.loads((state / name / "measured.json").read_text())
        assert found["accuracy"]["clean"]["images"] == 20
        assert not (state / name / "shards").exists()
    assert "Not run yet" not in (tmp_path / "docs" / "results" / "digits.md").read_text()
