"""`python -m tla_service.training` as a user runs it: refused, started twice, killed, stopped, and started again."""

import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import without_speed
from tla_service.job import run_job
from tla_service.training.__main__ import main
from tla_service.training.reporting import LocalReporter

ARGUMENTS = shlex.split(
    "--preset digits --data.train_limit 200 --data.test_limit 40 --training.epochs 3 --evaluation.every_epochs 1 "
    "--training.global_batch_size 50 --training.log_every_steps 1"
)


class Started:
    """A run in a process of its own, forked: torch need not be imported again.

    Args:
        folder: For what it prints.
        arguments: Its command line.
        stop_at: Step after which it gets a SIGTERM, if any.
    """

    def __init__(self, folder: Path, arguments: list[str], stop_at: int | None = None) -> None:
        self._printed = folder / "out", folder / "err"
        self._process = multiprocessing.get_context("fork").Process(target=self._work, args=(arguments, stop_at))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def _work(self, arguments: list[str], stop_at: int | None) -> None:
        original = LocalReporter.progress

        def progress(reporter: LocalReporter, record: Mapping[str, Any]) -> None:
            original(reporter, record)
            if record["event"] == "step" and record["step"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        LocalReporter.progress = progress  # type: ignore[method-assign]
        for descriptor, path in zip((1, 2), self._printed, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
        sys.argv = ["training", *arguments]
        os._exit(run_job(main))

    def wait(self, seconds: float = 100) -> tuple[int | None, str, str]:
        """Exit code and what it printed."""
        self._process.join(seconds)
        return (self._process.exitcode, *(path.read_text() for path in self._printed))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < deadline
            assert self._process.is_alive(), self.wait()
            time.sleep(0.01)


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a run in a folder; what is left of it is killed at the end."""
    started: list[Started] = []

    def call(output: str, *arguments: str, stop_at: int | None = None) -> Started:
        folder = tmp_path / f"printed-{len(started)}"
        folder.mkdir()
        started.append(Started(folder, [*ARGUMENTS, "--output", str(tmp_path / output), *arguments], stop_at))
        return started[-1]

    yield call
    for each in started:
        if each.wait(0)[0] is None:
            each.signal(signal.SIGKILL)
            each.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert Started(folder, [*ARGUMENTS, "--output", str(folder / "run")]).wait()[0] == 0
    return folder / "run"


def epochs(output: Path) -> list[dict[str, Any]]:
    """What the log tells of epochs."""
    path = output / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return without_speed([line["metrics"] for line in lines if line["event"] == "epoch"])


def last_weights(output: Path) -> bytes:
    return (output / "checkpoints" / "step-000000012" / "model.safetensors").read_bytes()


def test_a_second_start_is_refused_and_a_killed_run_resumes_at_once(start: Start, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = start("run")
    first.wait_for(lambda: (output / "log.jsonl").exists() and len(epochs(output)) > 1)
    first.signal(signal.SIGSTOP)
    code, _, told = start("run").wait()
    assert code == 2
    assert told.count("\n") == 1
    assert told.startswith(f"error: output={output}: in use by process {first.pid} on ")
    first.signal(signal.SIGKILL)
    assert first.wait()[0] == -signal.SIGKILL
    code, printed, told = start("run").wait()
    assert (code, told) == (0, "")
    assert f"resuming from {output}/checkpoints/step-" in printed
    assert last_weights(output) == last_weights(whole)


def test_a_refused_run_does_not_keep_the_folder_from_the_mended_one(start: Start, tmp_path: Path) -> None:
    for arguments, field, code in (
        (("--mining.pool", "separate", "--mining.pool_size", "5000"), "mining.pool_size", 2),
        (("--model.pretrained", str(tmp_path / "nowhere")), "model.pretrained", 3),
        (("--loss.triplet_layer", "lower"), "loss.triplet_layer", 2),
        (("--data.train_limit", "5"), "data.train_limit", 2),
    ):
        refused, _, told = start("run", *arguments).wait()
        assert told.startswith(f"error: {field}=")
        assert refused == code
    code, _, told = start("run", "--training.epochs", "1").wait()
    assert code == 0, told


def test_a_run_stopped_within_an_epoch_tells_each_epoch_once_and_whole(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    code, _, told = start("run", stop_at=5).wait()  # within the second epoch: each has four steps
    assert (code, told) == (130, "stopping after a checkpoint; interrupt again to stop at once\ninterrupted\n")
    assert max((tmp_path / "run" / "checkpoints").glob("step-*")).name == "step-000000006"
    assert start("run").wait()[0] == 0
    assert epochs(tmp_path / "run") == epochs(whole)
    assert len(epochs(whole)) == 3
    assert last_weights(tmp_path / "run") == last_weights(whole)
