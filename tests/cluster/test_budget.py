"""When a sweep ends early: budgets, failures in a row, workers that are never placed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.test_tune import SPACE
from tests.tuning.conftest import run_config, space_of
from tla_service.cluster import attempts as budget_module
from tla_service.cluster.attempts import Budget, Plan, add_attempt
from tla_service.cluster.placement import Placement
from tla_service.tuning.space import Space
from tla_service.tuning.trials import Progress


def plan_of(space: Space, storage: Path, **changes: Any) -> Plan:
    return Plan(
        space,
        str(storage),
        **(
            {"placement": Placement(2, False, 1, 1), "weights": None, "max_concurrent": 1, "epochs": space.epochs()}
            | changes
        ),
    )


def tune_trial(number: int, report: dict[str, Any], status: str = "RUNNING", deaths: int = 0) -> Any:
    return SimpleNamespace(
        trial_id=str(number), status=status, num_failures=deaths, storage=None,
        config={"trial": {"number": number, "point": {"loss.margin": 0.1}}},
        last_result=report and {"time_total_s": 1.0, "done": True} | report,
    )  # fmt: skip


def placed() -> dict[str, Any]:
    """The report of a trial whose workers have just been placed."""
    return Progress().report() | {"worker_seconds": 0.001}


def end(budget: Budget, number: int, outcome: Any) -> None:
    trial = tune_trial(number, Progress().report(outcome=outcome, reason="the loss is not finite by step 7"))
    budget.on_trial_result(0, [], trial, trial.last_result)
    budget.on_trial_complete(0, [], trial)


def test_too_many_failures_in_a_row_end_a_sweep(tmp_path: Path) -> None:
    budget = Budget(plan_of(space_of(SPACE, failures_in_a_row=2), tmp_path))
    for number, outcome in enumerate(("failed", "finished", "failed")):
        end(budget, number, outcome)
    assert not budget.stop_all()
    budget.on_trial_error(0, [], tune_trial(3, {}, "ERROR", 4))
    assert budget.stop_all()
    assert budget.gave_up == (
        "2 trials failed one after another, the last: its process died 4 times (killed, or its node was lost)"
    )


def test_gpu_hours_count_from_the_workers_start_to_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])
    budget = Budget(plan_of(space_of(SPACE, max_gpu_hours=1), tmp_path, placement=Placement(2, True, 1, 0.5)))
    trial = tune_trial(0, Progress().report())
    budget.on_trial_result(0, [], trial, trial.last_result | {"worker_seconds": 600.0})
    now[0] += 1200
    assert budget.gpu_hours == pytest.approx(0.5)
    budget.on_trial_complete(0, [], trial)
    now[0] += 10_000
    assert budget.gpu_hours == pytest.approx(600 / 3600)  # as in its last report, which comes at its end
    assert not budget.stop_all()
    budget.on_trial_result(0, [], trial, trial.last_result)
    now[0] += 10_000
    assert not budget.stop_all()  # that trial waits for its workers
    budget.on_trial_result(0, [], trial, placed())
    now[0] += 3000
    assert budget.stop_all()
    assert budget.used_up == "sweep.max_gpu_hours=1 are used"


def test_what_a_process_that_died_had_used_counts_in_a_resumed_sweep_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])
    budget, trial = Budget(plan_of(space_of(SPACE), tmp_path)), tune_trial(0, {})
    for _ in range(3):
        report = Progress().report() | {"worker_seconds": 600.0, "restarts": 1, "time_total_s": 700.0}
        budget.on_trial_result(0, [], trial, report)
        trial.last_result = report
        now[0] += 60
        budget.on_trial_recover(0, [], trial)
        budget.on_trial_recover(0, [], trial)  # before it reports
    now[0] += 10_000
    assert budget.gpu_hours == pytest.approx(2 * 3 * 660 / 3600)
    ended = add_attempt({}, trial)
    assert (ended.worker_seconds, ended.seconds, ended.restarts) == (3 * 660, 3 * 700, 3)


def test_wall_time_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])
    budget = Budget(plan_of(space_of(SPACE, max_hours=1), tmp_path))
    now[0] += 3599
    assert not budget.stop_all()
    now[0] += 2
    assert budget.stop_all()
    assert budget.used_up == "sweep.max_hours=1 are over"


def test_workers_that_are_never_placed_end_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])
    space = space_of(SPACE, run=run_config(scaling={"wait_seconds": 60}), max_concurrent=1)
    training, waiting = (Budget(plan_of(space, tmp_path)) for _ in range(2))
    trial = tune_trial(0, Progress().report("waiting for 2 workers to be placed"))
    training.on_trial_result(0, [], trial, placed())
    waiting.on_trial_result(0, [], trial, trial.last_result)
    now[0] += 61
    assert (training.stop_all(), waiting.stop_all()) == (False, True)
    assert str(waiting.error).startswith("scaling.wait_seconds=60.0: the cluster has not placed any trial's workers")
