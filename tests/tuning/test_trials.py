"""What a trial reports, what is known of it over attempts, the winner and the table."""

import csv
import io
from typing import Any

import pytest

from tests.tuning.conftest import run_config, space_of, trial_of
from tla_service.tuning import trials as trials_module
from tla_service.tuning.axes import COLUMNS
from tla_service.tuning.trials import Progress, Score, Trial, as_csv, counts, table, winner


def metrics(epoch: int, robust: float | None = None) -> dict[str, float]:
    validation = {} if robust is None else {"validation/robust_accuracy": robust, "validation/clean_accuracy": 0.9}
    return {"epoch": float(epoch), "train/loss": 1.0} | validation


def start(*history: dict[str, float]) -> dict[str, Any]:
    return {"event": "start", "workers": 2, "epochs": 5, "resumed": bool(history), "history": list(history)}


def epoch(number: int, robust: float | None = None) -> dict[str, Any]:
    return {"event": "epoch", "metrics": metrics(number, robust)}


def told(report: dict[str, Any], *, done: bool = False) -> dict[str, Any]:
    """A report as Ray Tune keeps it."""
    return report | {"time_total_s": 10.0, "done": done}


def test_reports_are_complete_and_hold_the_best_so_far() -> None:
    progress = Progress()
    assert progress.add(start()) == "starts training"
    first = progress.report()
    assert (first["epochs"], first["robust_accuracy"], first["curve"], first["metrics"]) == (0, 0.0, [], [])
    assert progress.add(epoch(0)) is None
    assert progress.add(epoch(1, 0.6)) == ""
    report = progress.report()
    assert (report["epochs"], report["total_epochs"], report["robust_accuracy"]) == (2, 5, 0.6)
    assert [each["epoch"] for each in report["metrics"]] == [0, 1]
    progress.add(epoch(3, 0.5))
    report = progress.report()
    assert (report["epochs"], report["robust_accuracy"], report["clean_accuracy"]) == (4, 0.6, 0.9)
    assert report["curve"] == [[2, 0.6, 0.9], [4, 0.5, 0.9]]
    assert [each["epoch"] for each in report["metrics"]] == [3]


def test_epochs_that_are_repeated_after_a_restart_count_once() -> None:
    progress = Progress()
    progress.add(start())
    for number in range(3):
        progress.add(epoch(number, number / 10))
    progress.report()
    assert progress.add({"event": "failure", "message": "workers failed"}) == "workers failed"
    assert progress.add(start(metrics(0, 0.0), metrics(1, 0.1))) == "resumes from its last checkpoint"
    assert progress.add(epoch(2, 0.9)) is None
    assert progress.add(epoch(3, 0.3)) == ""
    report = progress.report()
    assert [epochs for epochs, *_ in report["curve"]] == [1, 2, 3, 4]
    assert (report["curve"][2][1], report["restarts"]) == (0.2, 1)
    assert [each["epoch"] for each in report["metrics"]] == [3]


def test_a_resumed_trial_reports_its_history_at_once() -> None:
    progress = Progress()
    progress.add(start(metrics(0, 0.4), metrics(1), metrics(2, 0.3)))
    report = progress.report()
    assert (report["epochs"], report["robust_accuracy"], len(report["metrics"])) == (3, 0.4, 3)


def test_a_failed_trial_is_worth_nothing_and_keeps_its_curve() -> None:
    progress = Progress()
    progress.add(start())
    progress.add(epoch(0, 0.7))
    report = progress.report(outcome="failed", reason="the loss is not finite")
    assert (report["epochs"], report["robust_accuracy"], report["clean_accuracy"]) == (0, 0.0, 0.0)
    assert len(report["curve"]) == 1


def test_workers_time_runs_from_when_they_are_first_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(trials_module.time, "monotonic", lambda: now[0])
    progress = Progress()
    assert progress.report()["worker_seconds"] == 0
    now[0] = 130.0
    progress.add({"event": "waiting", "message": "waiting for 2 workers"})
    assert progress.report()["worker_seconds"] == 0
    assert progress.add({"event": "placed"}) == ""  # told at once: a sweep waits for it
    progress.add(start())
    now[0] = 140.0
    progress.add({"event": "placed"})
    now[0] = 150.0
    assert progress.report()["worker_seconds"] == 20


def test_attempts_add_up() -> None:
    trial = Trial(3, {"loss.margin": 0.1})
    trial.add_attempt({"trial_id": "a"})  # what Ray Tune knows of a trial before its first report
    assert (trial.status, trial.attempts) == ("running", 1)
    progress = Progress()
    progress.add(start())
    progress.add(epoch(0, 0.4))
    trial.add_attempt(told(progress.report()))
    assert (trial.status, trial.epochs) == ("running", 1)
    progress.add({"event": "failure", "message": "x"})
    trial.add_attempt(told(Progress().report()))
    assert (trial.epochs, trial.value("robust_accuracy")) == (1, 0.4)  # an attempt that came to nothing loses nothing
    progress.add(epoch(1, 0.5))
    trial.add_attempt(told(progress.report(outcome="finished", test={"clean_accuracy": 0.8}), done=True))
    assert (trial.status, trial.epochs, trial.restarts, trial.attempts) == ("finished", 2, 1, 4)
    assert (trial.seconds, trial.test) == (30.0, {"clean_accuracy": 0.8})


def test_a_trial_that_ray_tune_ended_was_stopped() -> None:
    progress = Progress()
    progress.add(start())
    progress.add(epoch(2, 0.4))
    trial = Trial(0, {})
    trial.add_attempt(told(progress.report(), done=True))
    assert (trial.status, trial.reason) == ("stopped", "behind the others after epoch 2")


def test_a_trial_whose_process_died_too_often_has_failed() -> None:
    trial = Trial(0, {})
    trial.add_attempt({}, deaths=4)
    assert (trial.status, trial.reason) == ("failed", "its process died 4 times (killed, or its node was lost)")


def test_the_best_score_is_the_one_whose_weights_a_run_keeps() -> None:
    trial = Trial(0, {}, curve=[Score(1, 0.5, 0.8), Score(2, 0.5, 0.9), Score(3, 0.5, 0.9), Score(4, 0.4, 1.0)])
    assert trial.best == Score(2, 0.5, 0.9)
    trial.selected_by = "clean_accuracy"
    assert trial.best == Score(4, 0.4, 1.0)
    assert Trial(0, {}).best is None


def test_a_natural_trial_is_worth_its_clean_accuracy() -> None:
    run = run_config(method="natural")
    assert (space_of(run=run).objectives, space_of().objectives) == (("clean_accuracy",), ("robust_accuracy",))
    progress = Progress()
    progress.selected_by = run.selected_by
    progress.add(start())
    for number, (robust, clean) in enumerate([(0.3, 0.2), (0.0, 0.9), (0.1, 0.8)]):
        accuracies = {"validation/robust_accuracy": robust, "validation/clean_accuracy": clean}
        progress.add({"event": "epoch", "metrics": metrics(number) | accuracies})
    report, trial = progress.report(outcome="finished"), Trial(0, {})
    assert (report["robust_accuracy"], report["clean_accuracy"]) == (0.0, 0.9)
    trial.add_attempt(told(report))
    assert trial.best == Score(2, 0.0, 0.9)


def test_the_table_has_a_row_per_trial_and_survives_as_csv() -> None:
    space = space_of({"loss.margin": [0.1, 0.2], "loss.triplet_weight": [1]})
    trials = [
        trial_of(0, [0.4, 0.6, 0.5], point={"loss.margin": 0.1, "loss.triplet_weight": 1}, status="finished"),
        Trial(1, {"loss.margin": 0.2, "loss.triplet_weight": 1}, "failed", reason='the loss, "it", is not finite'),
    ]
    trials[0].test = {"clean_accuracy": 0.9}
    rows = table(trials, space)
    assert (rows[0]["best_epoch"], rows[0]["validation/robust_accuracy"], rows[0]["test/clean_accuracy"]) == (
        1, 0.6, 0.9,
    )  # fmt: skip
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["reason"] for row in read] == ["", 'the loss, "it", is not finite']
    assert read[1]["validation/robust_accuracy"] == ""
    assert counts(trials) == "2 trials: 1 finished, 1 failed"
    assert counts([]) == "no trials"
    assert [name for name in rows[0] if "." not in name and "/" not in name] == [*COLUMNS]


def test_the_winner_is_a_finished_trial_if_there_is_one() -> None:
    stopped, finished = trial_of(0, [0.9], status="stopped"), trial_of(1, [0.5, 0.7, 0.6], status="finished")
    failed = trial_of(2, [0.95], status="failed")
    assert winner([stopped, finished, failed], "robust_accuracy") is finished
    assert winner([stopped, failed], "robust_accuracy") is stopped
    assert winner([failed], "robust_accuracy") is None


def test_equal_robust_accuracy_is_decided_by_clean_accuracy() -> None:
    first, second = trial_of(0, [0.6], status="finished"), Trial(1, {}, "finished", [Score(1, 0.6, 0.99)])
    assert winner([first, second], "robust_accuracy") is second
    assert winner([first, second], "clean_accuracy") is second


def test_plain_values_can_be_written_as_json() -> None:
    fields = trial_of(0, [0.5], status="finished").as_dict()
    assert fields["curve"] == [{"epochs": 1, "robust_accuracy": 0.5, "clean_accuracy": pytest.approx(0.75)}]
