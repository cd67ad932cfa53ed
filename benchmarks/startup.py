"""Time before the first step: imports, the command line, a submitted job, and the trials of a sweep."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import Results
from benchmarks.timing import Spread

_ROOT = Path(__file__).parents[1]
_IMPORTS = ("tla_service", "tla_service.config.loading", "torch", "tla_service.training.fit", "ray", "mlflow")
_QUICK = "--preset digits --data.train_limit 200 --data.test_limit 20 --training.epochs 1 --training.log_every_steps 1"
# What the job's JSON lines say when a phase has ended, in order.
_MARKS = (
    ("settings and checks read, MLflow asked", '"run digits-'),
    ("joined Ray, placed, run opened", '"MLflow: '),
    ("workers started, data and network there", '"training on '),
    ("first step logged", '"event": "step"'),
    ("run ended, model registered", '"clean accuracy'),
)
# Four short trials of two workers, one after another.
_NUM_TRIALS = 4
_SWEEP = f"--training.epochs 3 --scaling.num_workers 2 --sweep.num_samples {_NUM_TRIALS} --sweep.scheduler none"
_DEADLINE = 240
_ROUNDS = 3


def measure_startup(results: Results) -> None:
    """Imports and commands, each in a new process; then one submitted job."""
    rows = []
    for module in _IMPORTS:
        code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        spread = Spread.of([float(_run([sys.executable, "-c", code])[0]) for _ in range(_ROUNDS)])
        rows.append([f"`import {module}`", *_milliseconds(spread)])
        results.raw[f"import {module}"] = spread.median
    for flag in ("--help", "--print_config yaml"):
        command = [sys.executable, "jobs/train_tla.py", *flag.split()]
        spread = Spread.of([_run(command)[1] for _ in range(_ROUNDS)])
        rows.append([f"`jobs/train_tla.py {flag}`", *_milliseconds(spread)])
        results.raw[f"train_tla.py {flag}"] = spread.median
    results.table("Start", ["what", "ms", "quartiles"], rows)
    if shutil.which("ray", path=_path()) is not None:
        _measure_job(results)
        _measure_trials(results)


def _measure_job(results: Results) -> None:
    with _cluster() as address, tempfile.TemporaryDirectory(prefix="tla-") as folder:
        command = ["ray", "job", "submit", "--address", address, "--working-dir", str(_ROOT / "jobs"), "--"]
        command += [sys.executable, str(_ROOT / "jobs" / "train_tla.py"), *_QUICK.split(), "--log_format", "json"]
        command += ["--output", f"{folder}/run", "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]
        began = time.monotonic()
        process = subprocess.Popen(
            command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )
        assert process.stdout is not None
        watchdog = threading.Timer(_DEADLINE, process.kill)
        watchdog.start()
        seen: dict[str, float] = {}
        tail: list[str] = []
        for line in process.stdout:
            tail = [*tail[-20:], line]
            for name, mark in _MARKS:
                if mark in line and name not in seen:
                    seen[name] = time.monotonic() - began
        process.wait()
        watchdog.cancel()
    if process.returncode:
        print("the submitted job failed:\n" + "".join(tail))
        return
    rows, before = [], 0.0
    for name, _ in _MARKS:
        if name in seen:
            rows.append([name, f"{seen[name] - before:.1f}", f"{seen[name]:.1f}"])
            before = seen[name]
    results.raw["submitted job"] = seen
    results.table("Submitted job", ["until", "s", "s since `ray job submit`"], rows)


def _measure_trials(results: Results) -> None:
    with tempfile.TemporaryDirectory(prefix="tla-") as folder:
        command = [sys.executable, str(_ROOT / "jobs" / "tune_tla.py"), *_QUICK.split(), *_SWEEP.split()]
        command += ["--output", f"{folder}/sweep", "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]
        done = subprocess.run(
            command, env=_environment(), cwd=folder, capture_output=True, text=True, timeout=2 * _DEADLINE, check=False
        )
        summary = Path(folder, "sweep", "sweep.json")
        if done.returncode or not summary.exists():
            print(f"the sweep failed:\n{done.stdout}\n{done.stderr}")
            return
        seconds = json.loads(summary.read_text())["wall_seconds"] / _NUM_TRIALS
    results.raw["seconds per trial"] = seconds
    results.table("Trials", ["sweep", "s"], [["wall time per short trial", f"{seconds:.1f}"]])


@contextlib.contextmanager
def _cluster() -> Iterator[str]:
    """A Ray head with two CPUs, its own ports and folder; yields the address of its dashboard."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    port, dashboard, client = _free_port(), _free_port(), _free_port()
    command = f"ray start --head --block --num-cpus 2 --disable-usage-stats --temp-dir {folder} --port {port}"
    command += f" --dashboard-port {dashboard} --ray-client-server-port {client}"
    head = subprocess.Popen(
        command.split(),
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _DEADLINE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str]) -> tuple[str, float]:
    began = time.perf_counter()
    done = subprocess.run(command, cwd=_ROOT, env=_environment(), capture_output=True, text=True, check=True)
    return done.stdout, time.perf_counter() - began


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TLA_", "MLFLOW_"))}
    return kept | {"PATH": _path(), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(_ROOT)}


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _milliseconds(spread: Spread) -> tuple[str, str]:
    return f"{1000 * spread.median:.0f}", f"{1000 * spread.low:.0f} to {1000 * spread.high:.0f}"
