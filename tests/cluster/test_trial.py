"""How a trial reports and how it ends: in one line, and at once where another attempt would end the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.test_budget import plan_of
from tests.tuning.conftest import space_of
from tla_service.cluster import attempts
from tla_service.cluster.attempts import Budget, reason_of, run_trial
from tla_service.errors import UnavailableError
from tla_service.training.meter import NonFiniteLossError
from tla_service.training.output import FitResult
from tla_service.tuning.trials import Trial

OUT_OF_MEMORY = "workers failed: {0: 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.'}"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(attempts.tune, "report", reports.append)
    return reports


def play(monkeypatch: pytest.MonkeyPatch, *records: dict[str, Any], history: Any = ()) -> None:
    """Run a trial whose workers tell these records and come to an end."""

    def fit(run: Any, placement: Any, storage: str, follow: Any, weights: Any, **ends: Any) -> Any:
        assert run.name.startswith("digits-tla-sweep-")
        assert "-0007-" in run.name
        for record in records:
            follow(record)
        return FitResult(False, {"clean_accuracy": 0.9}, {}, list(history), {}), None

    monkeypatch.setattr(attempts, "fit_on_ray", fit)
    space = space_of({"loss.margin": {"low": 0.005, "high": 0.2}})
    run_trial({"trial": {"number": 7, "point": {"loss.margin": 0.1}}}, plan_of(space, Path("/x")))


def test_running_out_of_memory_ends_a_trial_at_once(
    monkeypatch: pytest.MonkeyPatch, sent: list[dict[str, Any]]
) -> None:
    play(monkeypatch, {"event": "failure", "message": OUT_OF_MEMORY}, {"event": "start"})
    assert [report["outcome"] for report in sent] == ["running", "failed"]
    assert sent[-1]["reason"] == f"MemoryError: {OUT_OF_MEMORY}"


def test_other_failures_are_left_to_restarts(monkeypatch: pytest.MonkeyPatch, sent: list[dict[str, Any]]) -> None:
    failure = {"event": "failure", "message": "workers failed: {1: 'The actor died unexpectedly'}"}
    play(monkeypatch, failure, {"event": "step", "loss": 1.0})
    assert [(report["outcome"], report["message"][:14]) for report in sent] == [
        ("running", "workers failed"),
        ("finished", ""),
    ]
    assert sent[-1]["test"] == {"clean_accuracy": 0.9}


def test_a_run_that_had_finished_before_still_reports_its_curve(
    monkeypatch: pytest.MonkeyPatch, sent: list[dict[str, Any]]
) -> None:
    epoch = {"epoch": 4.0, "validation/robust_accuracy": 0.5, "validation/clean_accuracy": 0.8}
    play(monkeypatch, history=[epoch])
    assert (sent[-1]["curve"], sent[-1]["metrics"]) == ([[5, 0.5, 0.8]], [epoch])


def test_storage_that_is_away_is_not_the_trials_fault(
    monkeypatch: pytest.MonkeyPatch, sent: list[dict[str, Any]], tmp_path: Path
) -> None:
    error = UnavailableError("scaling.storage", "s3://x", "cannot be written", "repair it")

    def follow(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(attempts, "fit_on_ray", follow)
    space = space_of({"loss.margin": [0.1]})
    plan = plan_of(space, tmp_path)
    run_trial({"trial": {"number": 0, "point": {"loss.margin": 0.1}}}, plan)
    (report,) = sent
    known = Trial(0, {})
    known.add_attempt(report | {"time_total_s": 1.0, "done": True})
    assert known.status == "running"  # --resume takes it up
    budget = Budget(plan)
    budget.on_trial_result(0, [], SimpleNamespace(trial_id="0"), report)  # type: ignore[arg-type]
    assert budget.stop_all()
    assert str(budget.error) == str(error)


def test_reasons_are_one_line() -> None:
    assert reason_of(NonFiniteLossError("the loss is not\nfinite")) == "the loss is not finite"
    assert reason_of(ValueError("a\n  b")) == "ValueError: a b"
    assert (
        reason_of(UnavailableError("data.root", "/x", "gone", "bring it back")) == "data.root=/x: gone; bring it back"
    )
