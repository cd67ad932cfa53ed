"""What is proposed depends on seed, number and history alone."""

import numpy as np
import pytest

from tests.tuning.conftest import run_config, space_of, trial_of
from tla_service.tuning.search import propose
from tla_service.tuning.space import Space
from tla_service.tuning.trial import Trial


def objective(point: dict[str, float]) -> float:
    """Highest, 1, at margin 0.05 and triplet weight 2."""
    distance = (point["loss.margin"] - 0.05) ** 2 / 0.01 + np.log(point["loss.triplet_weight"] / 2) ** 2 / 4
    return float(np.exp(-distance))


def two_weights(**sweep: object) -> Space:
    sweep = {"own_first": False} | sweep
    return space_of(
        {"loss.margin": {"low": 0.005, "high": 0.2}, "loss.triplet_weight": {"low": 0.1, "high": 8, "log": True}},
        **sweep,
    )


def searched(space: Space, count: int) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(count):
        point = propose(space, number, trials)
        assert point is not None
        trials.append(trial_of(number, [objective(point)], point=point, status="finished"))
    return trials


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_a_proposal_is_the_same_whoever_asks(searcher: str) -> None:
    trials = searched(two_weights(searcher=searcher, startup_trials=3), 6)
    again = propose(
        two_weights(searcher=searcher, startup_trials=3), 5, [Trial.from_dict(t.as_dict()) for t in trials[:5]]
    )
    assert again == trials[5].point
    assert len({str(trial.point) for trial in trials}) == 6
    other = propose(two_weights(searcher=searcher, startup_trials=3, seed=1), 5, trials[:5])
    assert other != trials[5].point


def test_tpe_learns_where_the_good_points_are() -> None:
    values = [trial.value("robust_accuracy") or 0.0 for trial in searched(two_weights(searcher="tpe"), 25)]
    assert np.mean(values[15:]) > np.mean(values[:10]) + 0.15
    by_chance = [trial.value("robust_accuracy") or 0.0 for trial in searched(two_weights(searcher="random"), 25)]
    assert np.mean(values[15:]) > np.mean(by_chance[15:]) + 0.15


def test_the_first_trial_is_the_run_itself() -> None:
    run = run_config(loss={"margin": 0.05, "triplet_weight": 2})
    space = {"loss.margin": {"low": 0.005, "high": 0.2}, "loss.triplet_weight": [1, 2]}
    assert propose(space_of(space, run=run), 0, []) == {"loss.margin": 0.05, "loss.triplet_weight": 2}
    assert propose(space_of(space, run=run, own_first=False), 0, []) != {"loss.margin": 0.05, "loss.triplet_weight": 2}
    variants = {
        "kind": {"variants": {"a": {"loss.margin": 0.1}, "b": {"loss.margin": 0.05}}},
        "loss.triplet_weight": [2],
    }
    assert propose(space_of(variants, run=run), 0, []) == {"kind": "b", "loss.triplet_weight": 2}
    elsewhere = propose(space_of({"loss.margin": {"low": 0.1, "high": 0.2}}, run=run), 0, [])
    assert elsewhere is not None
    assert elsewhere["loss.margin"] >= 0.1


def test_proposals_satisfy_constraints() -> None:
    space = two_weights(searcher="tpe", startup_trials=2, constraints=["loss.margin < 0.02 * loss.triplet_weight"])
    for trial in searched(space, 8):
        assert trial.point["loss.margin"] < 0.02 * trial.point["loss.triplet_weight"]


def test_stopped_failed_and_running_trials_are_taken_in() -> None:
    space = two_weights(searcher="tpe", startup_trials=1)
    trials = searched(space, 4)
    trials[1].status, trials[2].status, trials[3].status = "stopped", "failed", "running"
    trials[2].reports.clear()
    trials[3].reports.clear()
    assert propose(space, 4, trials) is not None


def test_two_objectives_are_searched_together() -> None:
    space = two_weights(searcher="tpe", startup_trials=2, objectives=["robust_accuracy", "clean_accuracy"])
    trials = searched(space, 5)
    trials[1].status = "stopped"
    trials[2].status = "failed"
    assert propose(space, 5, trials) is not None


def test_choices_come_back_as_they_were_given() -> None:
    space = space_of(
        {"training.global_batch_size": [32, 64], "data.flip": [True, False]},
        run=run_config(),
        searcher="tpe",
        startup_trials=1,
    )
    trials = []
    for number in range(5):
        point = propose(space, number, trials)
        assert point is not None
        assert type(point["training.global_batch_size"]) is int
        assert type(point["data.flip"]) is bool
        trials.append(trial_of(number, [0.5], point=point, status="finished"))


def test_a_grid_is_walked_once() -> None:
    space = space_of({"loss.margin": [0.01, 0.1], "seed": [0, 1]}, searcher="grid")
    points = [propose(space, number, []) for number in range(5)]
    assert [tuple(point.values()) if point else None for point in points] == [
        (0.01, 0), (0.01, 1), (0.1, 0), (0.1, 1), None,
    ]  # fmt: skip
