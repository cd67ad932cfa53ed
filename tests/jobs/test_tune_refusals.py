"""What can be wrong with a sweep: one message each, before anything starts."""

import multiprocessing
import time
from pathlib import Path

import pytest

from tests.jobs.conftest import Run
from tla_service.cluster.lease import held
from tla_service.cluster.storage import Folder
from tla_service.files import locked_folder

JOB = "tune_tla"


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown flag": (
        ("--sweep.nun_samples", "3"),
        "--sweep.nun_samples: no such flag; did you mean --sweep.num_samples?",
    ),
    "unknown field": (
        ("--sweep.space", '{"loss.margn": [0.1]}'),
        "sweep.space.loss.margn: the run has no field loss.margn; did you mean loss.margin?",
    ),
    "empty list": (("--sweep.space", '{"loss.margin": []}'), "sweep.space.loss.margin=[]: no values to choose from"),
    "bounds swapped": (
        ("--sweep.space", '{"loss.margin": {"low": 0.2, "high": 0.1}}'),
        "sweep.space.loss.margin.low=0.2: not below high=0.1",
    ),
    "zero on a log scale": (
        ("--sweep.space", '{"loss.margin": {"low": 0, "high": 0.1, "log": true}}'),
        "sweep.space.loss.margin.low=0: a logarithmic scale has no zero",
    ),
    "nothing allowed": (
        ("--sweep.constraints", '["loss.margin > 1"]'),
        "sweep.constraints: none of 1000 random points is allowed",
    ),
    "words for a range": (("--sweep.space", '{"loss.margin": {"low": "a"}}'), "sweep.space.loss.margin.low=a: "),
    "misspelt range": (
        ("--sweep.space", '{"loss.margin": {"lo": 1}}'),
        "sweep.space.loss.margin.lo=1: no such setting; did you mean low?",
    ),
    "unknown study": (("--study", "margins"), "study=margins: no such study; did you mean margin?"),
    "growing without a limit": (
        ("--scaling.wait_seconds", "60"),
        "sweep.max_concurrent: with scaling.wait_seconds the cluster may grow",
    ),
    "log lines as JSON": (("--log_format", "json"), "log_format=json: sweeps print text; use text"),
    "schema": (("--print_config", "schema"), "print_config=schema: there is one of runs, not of sweeps; use it with"),
    "unknown searcher": (("--sweep.searcher", "tpa"), "sweep.searcher=tpa: not one of tpe, random, grid"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_sweep_ends_with_2(run_in_process: Run, arguments: tuple[str, ...], message: str) -> None:
    code, error = run_in_process("--preset", "digits", *arguments)
    assert code == 2, error
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_sweep_that_exists_is_not_started_again_nor_changed(run_in_process: Run, tmp_path: Path) -> None:
    from tla_service.config.loading import read_settings
    from tla_service.tuning.settings import TuneSettings, sweep_yaml

    settings = read_settings(TuneSettings, ["--preset", "digits", "--scaling.num_workers", "2"])
    folder = tmp_path / "out" / "ray" / "mine"
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(sweep_yaml(settings.run_config, settings.sweep))
    arguments = ("--preset", "digits", "--sweep.name", "mine", "--output", str(tmp_path / "out"))
    code, error = run_in_process(*arguments)
    assert (code, "this sweep exists in" in error, "give --resume to continue it" in error) == (2, True, True)
    code, error = run_in_process(*arguments, "--resume", "--sweep.seed", "1")
    assert (code, "sweep.name=mine: this sweep has other settings" in error) == (2, True)
    code, error = run_in_process(*arguments, "--resume", "--loss.margin", "0.1")
    assert (code, "sweep.name=mine: this sweep has other settings" in error) == (2, True)
    code, error = run_in_process(*arguments, "--resume", "--scaling.num_workers", "3")
    assert (code, "scaling.num_workers=3: the sweep was started with 2" in error) == (2, True)
    # A larger budget is no other sweep: what is refused then is the tracking server.
    code, error = run_in_process(
        *arguments, "--resume", "--sweep.num_samples", "99", "--tracking.uri", "http://127.0.0.1:1"
    )
    assert (code, "no server answers" in error) == (3, True)


def test_what_is_missing_ends_with_3(run_in_process: Run) -> None:
    code, error = run_in_process("--preset", "digits", "--tracking.uri", "http://127.0.0.1:1")
    assert code == 3
    assert "no server answers" in error


def test_a_sweep_of_an_earlier_version_is_refused(run_in_process: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "ray" / "mine"
    folder.mkdir(parents=True)
    (folder / "driver.json").write_text("{}")
    arguments = ("--preset", "digits", "--sweep.name", "mine", "--output", str(tmp_path / "out"), "--resume")
    code, error = run_in_process(*arguments)
    assert (code, "sweep.name=mine: was begun by an earlier version" in error) == (2, True)


@pytest.mark.parametrize("where", ["output", "storage"])
def test_a_second_driver_is_refused(run_in_process: Run, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "out" if where == "output" else tmp_path / "shared" / "mine"
    context = multiprocessing.get_context("fork")
    holds = context.Event()

    def hold() -> None:
        with locked_folder(folder, where) if where == "output" else held(Folder(str(folder)), print):
            holds.set()
            time.sleep(600)

    arguments = ("--preset", "digits", "--sweep.name", "mine", "--output", str(tmp_path / "out"))
    arguments += ("--tracking.uri", "http://127.0.0.1:1")
    if where == "storage":
        arguments += ("--scaling.storage", str(tmp_path / "shared"))
    other = context.Process(target=hold, daemon=True)
    other.start()
    assert holds.wait(60)
    code_held, error = run_in_process(*arguments)
    other.kill()
    other.join()
    assert (code_held, error.count("\n")) == (2, 1)
    setting = "output" if where == "output" else "scaling.storage"
    assert error.startswith(f"error: {setting}={folder}: in use by process {other.pid} on ")
    code_free, error = run_in_process(*arguments)  # the lock has ended with its process
    assert (code_free, "no server answers" in error) == (3, True)
