"""The evaluation job as a user runs it: on Ray, killed, and taken up again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROOT
from tests.jobs.test_evaluate_refusals import checkpoint
from tla_service.evaluation.shards import load_outcome
from tla_service.report.schema import read_report

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

QUICK = [
    "--batch_size", "50", "--images.autoattack", "50", "--images.curves", "100", "--images.sparse", "20",
    "--images.corruptions", "20", "--images.certified", "20", "--images.audit", "50", "--images.representation", "200",
    "--images.bank", "300", "--neighbours.k", "10", "--images.unit_tests", "0", "--images.transfer", "0",
    "--scaling.num_workers", "2",
]  # fmt: skip


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TLA_", "RAY_", "MLFLOW_"))}
    variables |= {"RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, str(ROOT / "jobs" / "evaluate_tla.py"), *QUICK, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for_shards(output: Path, count: int) -> list[Path]:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = sorted(output.glob("shards/*/*.npz"))
        if len(found) >= count:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"no {count} shards in {output}")


def worker(job: "subprocess.Popen[str]") -> psutil.Process:
    """A process of the job that measures a shard; Ray's own processes are called ray::... as well."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(job.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() == "ray::_measure":
                    return child
        time.sleep(0.05)
    raise TimeoutError("no worker measures")


def test_killed_driver_and_killed_worker_lose_their_shards_only(tmp_path: Path) -> None:
    model, other = checkpoint(tmp_path / "first"), checkpoint(tmp_path / "other")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = start(tmp_path, "--model", model, "--surrogate", other, "--output", str(whole))
    printed, _ = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, printed

    first = start(tmp_path, "--model", model, "--surrogate", other, "--output", str(cut))
    wait_for_shards(cut, 4)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    saved = {path: path.stat().st_mtime_ns for path in cut.glob("shards/*/*.npz")}
    assert not (cut / "report.html").exists()
    damaged = next(iter(saved))
    damaged.write_bytes(damaged.read_bytes()[:50])

    # The same weights under another address: it is the same evaluation.
    again = str(shutil.copytree(model, tmp_path / "again"))
    second = start(tmp_path, "--model", again, "--surrogate", other, "--output", str(cut))
    wait_for_shards(cut, len(saved) + 3)
    worker(second).kill()
    printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0, printed
    kept = {path: path.stat().st_mtime_ns for path in saved if path != damaged}
    assert kept == {path: when for path, when in saved.items() if path != damaged}

    one, two = read_report(whole / "report.json"), read_report(cut / "report.json")
    assert one.accuracy == two.accuracy
    assert one.audit == two.audit
    assert one.shift == two.shift
    for name in ("outcome.npz", "autoattack.npz"):
        before, after = load_outcome(whole / name), load_outcome(cut / name)
        assert {k: v.tolist() for k, v in before.broken_at.items()} == {
            k: v.tolist() for k, v in after.broken_at.items()
        }
    assert json.loads((cut / "evaluation.json").read_text()) == json.loads((whole / "evaluation.json").read_text())

    third = start(tmp_path, "--model", model, "--surrogate", other, "--output", str(cut))
    printed, _ = third.communicate(timeout=120)
    assert third.returncode == 0
    assert "has finished before" in printed
