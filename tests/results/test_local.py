"""A table on one machine, from its command to its page: interrupted, killed, resumed; without ray and mlflow."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.results.conftest import settings_of
from tests.test_core_alone import WITHOUT
from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import locked_folder
from tla_service.results import runs as table
from tla_service.results.local import _Local, _StoppedError, open_state, reproduce, reproduce_here
from tla_service.results.runs import TableRun, table_runs, table_space

ROOT = Path(__file__).parents[2]
FLAGS = "--table digits --budget 1 --seeds 1 --methods at tla --side_by_side 1 --no-log"
CODE = WITHOUT + f"import runpy; runpy.run_path({str(ROOT / 'jobs' / 'reproduce_paper.py')!r}, run_name='__main__')"


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_is_measured_once_it_and_its_surrogate_are_trained(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(_Local, "_train", lambda _self, run: done.append(f"train {run.name}"))
    monkeypatch.setattr(_Local, "_measure", lambda _self, run: done.append(f"measure {run.name}"))
    pairs = [TableRun(f"{m}-s{s}", m, s, surrogate=f"{m}-s{1 - s}") for s in range(2) for m in ("at", "tla")]
    runs = [*pairs, TableRun("tla-t0", "tla", 0, is_trial=True), TableRun("tla-alone", "tla", 0)]
    settings = settings_of("--table", "digits")
    local = _Local(settings, table_space(settings, runs), tmp_path, done.append, count)
    assert local.make(runs)
    if count == 1:
        assert done == [
            "train at-s0", "train tla-s0", "train at-s1", "measure at-s0", "measure at-s1", "train tla-s1",
            "measure tla-s0", "measure tla-s1", "train tla-t0", "train tla-alone", "measure tla-alone",
        ]  # fmt: skip
    assert sorted(done) == sorted(
        [f"train {run.name}" for run in runs] + [f"measure {run.name}" for run in runs if not run.is_trial]
    )
    for run in pairs:
        needed = [f"train {run.name}", f"train {run.surrogate}"]
        assert done.index(f"measure {run.name}") > max(map(done.index, needed))
    # The surrogate has been trained before.
    done.clear()
    assert local.make(runs[:1])
    assert done == ["train at-s0", "measure at-s0"]


def test_a_run_that_cannot_be_measured_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def measure(_self: _Local, run: TableRun) -> None:
        if run.name == "at-s0":
            raise UnavailableError("run", run.name, "evaluation failed", "read its output")
        done.append(run.name)

    monkeypatch.setattr(_Local, "_train", lambda _self, _run: None)
    monkeypatch.setattr(_Local, "_measure", measure)
    runs = [TableRun(f"at-s{s}", "at", s, surrogate=f"at-s{1 - s}") for s in range(2)]
    settings = settings_of("--table", "digits")
    local = _Local(settings, table_space(settings, runs), tmp_path, done.append, 1)
    with pytest.raises(UnavailableError, match=r"^run=at-s0: evaluation failed"):
        local.make(runs)
    assert done == ["at-s1"]


def test_a_folder_of_another_table_is_refused(tmp_path: Path) -> None:
    open_state(settings_of("--table", "digits", "--budget", "5", "--state", str(tmp_path)))
    open_state(settings_of("--table", "digits", "--budget", "5", "--state", str(tmp_path), "--seeds", "9"))
    with pytest.raises(ConfigError, match="holds another table or other settings"):
        open_state(settings_of("--table", "digits", "--state", str(tmp_path)))
    assert json.loads((tmp_path / "table.json").read_text()) == {"table": "digits", "settings": "5-minutes"}


def test_runs_on_other_data_do_not_join_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("tla_service.results.local.write_page", lambda *_: "page.md")
    flags = ("--table", "digits", "--state", str(tmp_path / "state"), "--output", str(tmp_path / "page.md"))
    for made in (1, 2):  # no run finishes, so the data is read each time
        assert reproduce(settings_of(*flags), lambda *_: True) == 0, made
    (tmp_path / "state" / "data.txt").write_text("0123456789abcdef")
    with pytest.raises(ConfigError, match=r"^data.root: is not the data that the runs in .*/state were made from"):
        reproduce(settings_of(*flags), lambda *_: pytest.fail("ran"))


def test_a_table_that_another_process_works_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = settings_of("--table", "digits", "--state", str(tmp_path / "state"))
    with (
        locked_folder(tmp_path / "state", "state"),
        pytest.raises(ConfigError, match=rf"state={tmp_path}/state: in use by process {os.getpid()} on "),
    ):
        reproduce_here(settings)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("folder", "is a folder"),
        ("file/page.md", "File exists"),
        ("~nosuchuser/a.md", "no home folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_runs(
    output: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    settings = settings_of("--table", "digits", "--state", str(tmp_path / "state"), "--output", output)
    with pytest.raises(UnavailableError, match=rf"^output=.*{output}: ({reason})|^output=.*file: ({reason})"):
        reproduce_here(settings)
    assert not (tmp_path / "state").exists()


def test_missing_data_is_reported_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    flags = ("--table", "mnist", "--state", str(tmp_path / "state"), "--output", str(tmp_path / "page.md"))
    with pytest.raises(UnavailableError, match=rf"^data\.root={tmp_path}/none: "):
        reproduce_here(settings_of(*flags, "--data.root", str(tmp_path / "none")))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["table.json"]
    assert not (tmp_path / "page.md").exists()


def test_processes_end_well_fail_with_their_last_line_or_are_stopped(tmp_path: Path) -> None:
    settings = settings_of("--table", "digits", "--seeds", "1", "--methods", "at")
    (run,) = runs = table_runs(settings)
    (tmp_path / run.name).mkdir()
    said: list[str] = []
    local = _Local(settings, table_space(settings, runs), tmp_path, said.append, 1)
    local._run(run, "training", ["timeit", "-n", "1", "pass"])
    with pytest.raises(UnavailableError, match=r"^run=at-s0: training failed with exit code 1 \(.*No module named"):
        local._run(run, "training", ["tla_service.nothing"])
    threading.Timer(1.0, local._stop).start()
    began = time.monotonic()
    with pytest.raises(_StoppedError):
        local._run(run, "training", ["timeit", "-n", "1", "import time; time.sleep(60)"])
    assert time.monotonic() - began < 50
    with pytest.raises(_StoppedError):  # nothing starts after the stop
        local._run(run, "training", ["timeit", "-n", "1", "pass"])
    assert said == [
        f"at-s0: {text}" for text in ("training", "training done", "training", "training failed", "training")
    ]


def test_a_resumed_table_keeps_the_shards_of_an_unfinished_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "keep_best_only", lambda _checkpoint: None)
    for path in (f"checkpoints/step-1/{table.MANIFEST}", "report/shards/autoattack.npz"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    table.slim(tmp_path)
    assert (tmp_path / "report/shards/autoattack.npz").exists()
    (tmp_path / "report/report.json").touch()
    table.slim(tmp_path)
    assert not (tmp_path / "report/shards").exists()


def start(folder: Path, *more: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TLA_")}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *FLAGS.split(), *more],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_table_is_made_in_pieces_and_what_has_finished_is_not_repeated(tmp_path: Path) -> None:
    state, page = tmp_path / "runs" / "tables" / "digits-1-minutes", tmp_path / "docs" / "results" / "digits.md"
    cut = start(tmp_path, "--minutes", "0.02")
    printed, _ = cut.communicate(timeout=400)
    assert cut.returncode == 75, printed
    assert "unfinished; the same command resumes" in printed
    assert "2 runs: `at-s0`, `tla-s0`" in page.read_text()

    killed = start(tmp_path)
    while not (state / "at-s0" / "report" / "report.json").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = (state / "at-s0" / "report" / "report.json").stat().st_mtime_ns
    whole = start(tmp_path)
    printed, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, printed
    assert "at-s0:" not in printed
    assert (state / "at-s0" / "report" / "report.json").stat().st_mtime_ns == before
    found = json.loads((state / "tla-s0" / "report" / "report.json").read_text())
    assert found["accuracy"]["clean"]["images"] + found["gate"]["accuracy"]["clean"]["images"] == 20
    assert found["accuracy"]["autoattack"]["estimate"] <= found["accuracy"]["clean"]["estimate"]
    assert [ratios["epsilon"] for ratios in found["shift"]] == pytest.approx([0.15, 0.225])
    assert not (state / "tla-s0" / "report" / "shards").exists()
    (checkpoint,) = (state / "tla-s0" / "checkpoints").glob("step-*")
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "best.safetensors", "config.yaml", "data.json", "manifest.json",
    ]  # fmt: skip
    assert f"{100 * found['accuracy']['clean']['estimate']:.1f}" in page.read_text()
    assert "Not run yet" not in page.read_text()
