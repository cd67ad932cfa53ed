"""The table, and where the time went, on stays made up by hand."""

import csv
import io

import pytest

from tests.tuning.conftest import space_of, trial_of
from tla_service.tuning.report import as_csv, overhead, table, told_counts
from tla_service.tuning.trial import Attempt, Trial, winner


def stay(trial: Trial, chosen: float, trained: float, last_epoch: float, ended: float) -> Trial:
    trial.attempts.append(Attempt(chosen, chosen + 1, trained, last_epoch, max(last_epoch, ended), ended))
    return trial


def test_where_the_time_went() -> None:
    trials = [
        stay(trial_of(0, [0.5], status="finished"), 1000, 1020, 1100, 1105),
        stay(trial_of(1, [0.5], status="stopped"), 1105, 1125, 1160, 1160),
        stay(trial_of(2, [0.5], status="running"), 1000, 1030, 1150, 0),
    ]
    trials[0].wall_seconds = {"data": 3.0, "build": 1.0, "train": 70.0}
    found = overhead(trials, slots=2, since=1000)
    assert found is not None
    # Setting up takes 4 s of what follows the workers' start: 76 + 31 + 116 s of 2 places for 160 s.
    assert found.wall_seconds == 160
    assert found.busy_share == pytest.approx((76 + 31 + 116) / 320)
    assert found.start_seconds == 24
    assert found.end_seconds == 2.5
    assert found.busy_share_of_five_minutes == pytest.approx(300 / 326.5)
    assert overhead(trials, slots=2, since=2000) is None


def test_waiting_on_deck_is_no_start() -> None:
    trials = [
        stay(trial_of(0, [0.5], status="finished"), 1000, 1020, 1100, 1101),
        stay(trial_of(1, [0.5], status="finished"), 1000, 1109, 1190, 1191),
        stay(trial_of(2, [0.5], status="finished"), 1101, 1199, 1280, 1281),
    ]
    found = overhead(trials, slots=1, since=1000)
    assert found is not None
    # 20 s for the first; the others' workers are training 8 s after the place was free.
    assert found.start_seconds == 8
    assert found.busy_share == pytest.approx((80 + 81 + 81) / 281)


def test_the_table_has_a_row_a_trial_and_survives_as_csv() -> None:
    space = space_of({"loss.margin": [0.1, 0.2], "loss.triplet_weight": [1]})
    trials = [
        trial_of(0, [0.4, 0.6, 0.5], point={"loss.margin": 0.1, "loss.triplet_weight": 1}, status="finished"),
        Trial(1, {"loss.margin": 0.2, "loss.triplet_weight": 1}, "failed", reason='the loss, "it", is not finite'),
    ]
    trials[0].test = {"clean_accuracy": 0.9}
    rows = table(trials, space)
    assert (rows[0]["best_epoch"], rows[0]["validation/robust_accuracy"], rows[0]["test/clean_accuracy"]) == (
        1,
        0.6,
        0.9,
    )
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["reason"] for row in read] == ["", 'the loss, "it", is not finite']
    assert read[1]["validation/robust_accuracy"] == ""
    assert told_counts(trials) == "2 trials: 1 finished, 1 failed"


def test_the_winner_is_a_finished_trial_if_there_is_one() -> None:
    stopped, finished = trial_of(0, [0.9], status="stopped"), trial_of(1, [0.5, 0.7, 0.6], status="finished")
    failed = trial_of(2, [0.95], status="failed")
    assert winner([stopped, finished, failed], "robust_accuracy") is finished
    assert winner([stopped, failed], "robust_accuracy") is stopped
    assert winner([failed], "robust_accuracy") is None


def test_equal_robust_accuracy_is_decided_by_clean_accuracy() -> None:
    first, second = trial_of(0, [0.6], status="finished"), trial_of(1, [0.6], status="finished")
    second.reports[0]["validation/clean_accuracy"] = 0.99
    assert winner([first, second], "robust_accuracy") is second
