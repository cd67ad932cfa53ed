"""Attempts at a sweep on Ray Tune, with trials that are played: killed, interrupted, continued, enlarged."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray import tune

from tests.cluster.conftest import RAY, ROOT
from tests.cluster.test_budget import plan_of
from tests.cluster.test_tune import SPACE, goodness
from tests.tuning.conftest import run_config, space_of
from tla_service.cluster import attempts as attempts_module
from tla_service.cluster import tune as ours
from tla_service.cluster.attempts import SNAPSHOT, Budget, Plan, Snapshots, attempts, read_trials
from tla_service.cluster.tune import run_trials
from tla_service.errors import UnavailableError
from tla_service.tuning.trials import Progress, Trial, winner


def test_a_snapshot_that_cannot_be_read_is_refused_and_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "tune-001").mkdir()
    assert read_trials(str(tmp_path)) == []  # killed before its first snapshot
    (tmp_path / "tune-001" / SNAPSHOT).write_text('{"trial_data": [[')
    with pytest.raises(UnavailableError, match="cannot be read or written"):
        read_trials(str(tmp_path))


def test_a_snapshot_that_cannot_be_copied_for_long_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "experiment_state-1.json").write_text("{}")
    (tmp_path / "tune-001").write_text("in the way")
    budget = Budget(plan_of(space_of(SPACE), tmp_path / "none"))
    trial: Any = SimpleNamespace(storage=SimpleNamespace(experiment_driver_staging_path=str(staged)))
    snapshots = Snapshots(str(tmp_path / "tune-001"), budget.fail)
    snapshots.on_step_end(0, [trial])
    assert not budget.stop_all()  # storage may be away for a while
    (tmp_path / "tune-001").unlink()
    snapshots.on_step_end(0, [trial])
    assert (tmp_path / "tune-001" / SNAPSHOT).read_text() == "{}"
    shutil.rmtree(tmp_path / "tune-001")
    (tmp_path / "tune-001").write_text("in the way")
    (staged / "experiment_state-2.json").write_text("{}")
    monkeypatch.setattr(attempts_module, "OUTAGE_SECONDS", -1)
    snapshots.on_step_end(0, [trial])
    assert budget.stop_all()
    assert isinstance(budget.error, UnavailableError)


def play(config: Any, plan: Plan) -> None:
    """A trial that is played instead of trained, with a checkpoint every third epoch."""
    number, point = config["trial"]["number"], config["trial"]["point"]
    folder = Path(plan.storage) / "trials" / plan.space.trial(number, point, 1).name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    progress = Progress()
    progress.add({"event": "placed"})
    history = [played(point, epoch) for epoch in range(first)]
    start = {"event": "start", "epochs": plan.epochs, "resumed": first > 0, "history": history}
    tune.report(progress.report(progress.add(start) or ""))
    for epoch in range(first, plan.epochs):
        if point.get("seed") == 666:
            tune.report(progress.report(outcome="failed", reason="the loss is not finite"))
            return
        if point.get("seed") == 13:
            os._exit(1)
        with (folder / "trained").open("a") as file:
            file.write(f"{epoch}\n")
        if (epoch + 1) % 3 == 0:
            checkpoint.write_text(str(epoch + 1))
        progress.add({"event": "epoch", "metrics": played(point, epoch)})
        time.sleep(float(os.environ.get("PLAY_SECONDS", "0")))
        tune.report(progress.report())
    tune.report(progress.report(outcome="finished"))


def played(point: dict[str, float], epoch: int) -> dict[str, float]:
    robust = goodness(point) * (1 - 0.9 ** (epoch + 1))
    return {"epoch": float(epoch), "validation/robust_accuracy": robust, "validation/clean_accuracy": 0.9}


def trained(storage: Path) -> dict[int, list[int]]:
    """By trial, which epochs were trained, in order."""
    files = sorted((storage / "trials").glob("*/trained"))
    return {int(file.parent.name.split("-")[-2]): [int(line) for line in file.read_text().split()] for file in files}


class Stopping(tune.Callback):
    """Ends the sweep as a signal does, when a trial has come so far."""

    def __init__(self, budget: Budget, number: int, epochs: int) -> None:
        self._budget, self._number, self._epochs = budget, number, epochs

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:  # noqa: ARG002
        if trial.config["trial"]["number"] == self._number and result["epochs"] >= self._epochs:
            self._budget.interrupted = True

    def __getstate__(self) -> dict[str, Any]:
        return {}


def outcome(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [(t.number, t.point, t.status, t.reason, t.curve) for t in trials]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(name, value)
        patch.setattr(sys, "path", sys.path[:])
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                 runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture
def run_played(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Budget]:
    monkeypatch.setattr(ours, "run_trial", play)
    for name in (
        "GLOBAL_CHECKPOINT_S",
        "DISABLE_AUTO_CALLBACK_LOGGERS",
        "DISABLE_SIGINT_HANDLER",
        "PRINT_ALL_TRIAL_ERRORS",
    ):
        monkeypatch.setenv(f"TUNE_{name}", "")  # put back afterwards

    def run(plan: Plan, stop_at: tuple[int, int] | None = None) -> Budget:
        budget = Budget(plan)
        run_trials(plan, budget, tune.Callback() if stop_at is None else Stopping(budget, *stop_at))
        return budget

    return run


@pytest.mark.ray
def test_attempts_add_up_to_one_sweep(run_played: Callable[..., Budget], tmp_path: Path) -> None:
    run = run_config(training={"epochs": 10, "global_batch_size": 64})
    space = space_of(SPACE, run=run, num_samples=2, grace_epochs=3)
    plan = plan_of(space, tmp_path)
    first = run_played(plan, (1, 8))
    seconds = first.wall_seconds
    assert first.interrupted
    before = read_trials(str(tmp_path))
    assert [(trial.number, trial.status) for trial in before] == [(0, "finished"), (1, "running")]
    assert before[1].epochs >= 8
    second = run_played(plan)
    assert not second.stop_all()
    after = read_trials(str(tmp_path))
    assert [trial.number for trial in after] == [0, 1]
    assert outcome(after)[0] == outcome(before)[0]
    assert (after[1].point, after[1].attempts, after[0].attempts) == (before[1].point, 2, 1)
    assert all(trial.status in ("finished", "stopped") for trial in after)
    assert trained(tmp_path)[0] == list(range(10))
    assert trained(tmp_path)[1].count(0) == 1  # from its checkpoint, not from the start
    best = winner(after, "robust_accuracy")
    assert best is not None
    assert best.value("robust_accuracy") == max(trial.value("robust_accuracy") or 0 for trial in after)
    assert second.wall_seconds > seconds
    # Nothing is left to do.
    run_played(plan)
    assert attempts(str(tmp_path)) == ["tune-001", "tune-002"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_grid_with_failures_is_walked_once_and_may_grow(run_played: Callable[..., Budget], tmp_path: Path) -> None:
    grid: dict[str, Any] = {"searcher": "grid", "scheduler": "none"}
    space = space_of({"loss.margin": [0.05, 0.1], "seed": [0, 666]}, num_samples=3, **grid)
    assert not run_played(plan_of(space, tmp_path, max_concurrent=2)).gave_up
    trials = read_trials(str(tmp_path))
    assert [(trial.number, trial.status) for trial in trials] == [(0, "finished"), (1, "failed"), (2, "finished")]
    assert trials[1].reason == "the loss is not finite"
    larger = space_of({"loss.margin": [0.05, 0.1], "seed": [0, 666]}, failures_in_a_row=1, **grid)
    assert run_played(plan_of(larger, tmp_path)).gave_up.startswith("1 trials failed one after another")
    trials = read_trials(str(tmp_path))
    assert [trial.status for trial in trials] == ["finished", "failed", "finished", "failed"]
    assert [trial.attempts for trial in trials] == [1, 1, 1, 1]
    # A grid that got another point in front keeps the numbers of the trials it knows, and may repeat failed ones; those
    # that have finished are repeated in folders of their own.
    other = space_of({"loss.margin": [0.02, 0.05], "seed": [0, 666]}, **grid)
    run_played(plan_of(other, tmp_path, repeat=True))
    trials = read_trials(str(tmp_path))
    assert [trial.point["loss.margin"] for trial in trials] == [0.05, 0.05, 0.1, 0.1, 0.02, 0.02, 0.05]
    assert [trial.attempts for trial in trials] == [1, 2, 1, 1, 1, 1, 1]


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_process_dies_again_and_again_has_failed(
    run_played: Callable[..., Budget], tmp_path: Path
) -> None:
    space = space_of({"seed": [13, 0]}, searcher="grid", scheduler="none")
    run_played(plan_of(space, tmp_path))
    trials = read_trials(str(tmp_path))
    assert [trial.status for trial in trials] == ["failed", "finished"]
    assert trials[0].reason.startswith("its process died 4 times")


@pytest.mark.ray
@pytest.mark.slow
def test_a_space_that_runs_out_ends_the_sweep(run_played: Callable[..., Budget], tmp_path: Path) -> None:
    plan = plan_of(space_of({"loss.margin": [0.05, 0.1]}, num_samples=9, scheduler="none"), tmp_path)
    for _ in range(2):
        run_played(plan)
        assert [trial.status for trial in read_trials(str(tmp_path))] == ["finished", "finished"]


@pytest.mark.ray
@pytest.mark.slow
def test_two_objectives_and_budgets_on_a_cluster(run_played: Callable[..., Budget], tmp_path: Path) -> None:
    objectives = ["robust_accuracy", "clean_accuracy"]
    run_played(plan_of(space_of(SPACE, num_samples=3, objectives=objectives), tmp_path / "two"))
    assert len(read_trials(str(tmp_path / "two"))) == 3
    used = run_played(plan_of(space_of(SPACE, max_gpu_hours=1e-9), tmp_path / "hours"))
    assert used.used_up == "sweep.max_gpu_hours=1e-09 are used"
    assert len(read_trials(str(tmp_path / "hours"))) == 1
    over = run_played(plan_of(space_of(SPACE, max_hours=4 / 3600), tmp_path / "time"))
    assert over.used_up.startswith("sweep.max_hours=")
    assert len(read_trials(str(tmp_path / "time"))) < 16
    more = plan_of(space_of(SPACE, max_gpu_hours=1, num_samples=2), tmp_path / "hours")
    run_played(more)
    assert len([trial for trial in read_trials(more.storage) if trial.status != "running"]) == 2


KILLED = """
import os, sys
from pathlib import Path
import ray
from ray import tune
from tests.cluster import test_attempts
from tests.cluster.test_budget import plan_of
from tests.cluster.test_tune import SPACE
from tests.tuning.conftest import space_of
from tla_service.cluster import tune as ours
from tla_service.cluster.attempts import Budget
ours.run_trial = test_attempts.play
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
plan = plan_of(space_of(SPACE, num_samples=5, grace_epochs=3), Path(sys.argv[1]), max_concurrent=2)
budget = Budget(plan)
ours.run_trials(plan, budget, tune.Callback())
"""


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_a_driver_that_is_killed_again_and_again_repeats_no_ended_trial(seed: int, tmp_path: Path) -> None:
    rng, ended = np.random.default_rng(seed), dict[int, tuple[Any, ...]]()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "PLAY_SECONDS": "0.15"}
    for kill in (True, True, True, False):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], env=variables, cwd=ROOT, start_new_session=True
        )
        try:
            if kill:
                before = sum(len(epochs) for epochs in trained(tmp_path).values())
                goal = before + int(rng.integers(5, 14))
                while process.poll() is None and sum(len(epochs) for epochs in trained(tmp_path).values()) < goal:
                    time.sleep(0.02)
            else:
                assert process.wait(600) == 0
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
        trials = {trial.number: trial for trial in read_trials(str(tmp_path))}
        for number, known in ended.items():
            assert outcome([trials[number]])[0] == known
        ended |= {n: outcome([trial])[0] for n, trial in trials.items() if trial.status in ("finished", "stopped")}
    assert sorted(ended) == sorted(trials) == list(range(len(trials)))
    assert len(trials) == 5
    for epochs in trained(tmp_path).values():
        # Each epoch was trained; a resumed trial goes back to its last checkpoint and no further.
        assert sorted(set(epochs)) == list(range(max(epochs) + 1))
        steps = itertools.pairwise(epochs)
        assert all(after == before + 1 or (after % 3 == 0 and before - after <= 3) for before, after in steps)
    assert json.loads((tmp_path / "tune-001" / SNAPSHOT).read_text())["trial_data"]
