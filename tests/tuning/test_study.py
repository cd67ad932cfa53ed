"""Trials and points in Optuna's terms and back."""

import numpy as np
import optuna
import pytest

from tests.tuning.conftest import run_config, space_of, trial_of
from tla_service.tuning.trials import Trial, distributions, sampler_of, study_of, to_params, to_point


def test_points_come_back_as_they_were() -> None:
    space = space_of(
        {
            "training.global_batch_size": [32, 64],
            "data.flip": [True, False],
            "loss.margin": {"low": 0.01, "high": 0.2},
            "attack.num_steps": {"low": 1, "high": 9, "log": True},
            "schedule.milestones": [[5], [5, 9]],
            "pool size": {"variants": {"1": {"method": "tla_rn"}, "250": {"mining.pool_size": 250}}},
        },
        run=run_config(
            mining={"pool": "separate", "pool_size": 250}, schedule={"name": "piecewise", "milestones": [3]}
        ),
    )
    axes, rng = distributions(space), np.random.default_rng(0)
    for _ in range(20):
        point = {axis.name: axis.draw(rng) for axis in space.axes}
        params = to_params(space, point)
        frozen = optuna.trial.create_trial(params=params, distributions=axes, value=0.0)
        back = to_point(space, frozen.params)
        assert back == point
        assert {name: type(value) for name, value in back.items()} == {n: type(v) for n, v in point.items()}


def test_failed_trials_count_as_nothing() -> None:
    space = space_of({"loss.margin": {"low": 0.01, "high": 0.2}})
    trials = [
        trial_of(0, [0.5, 0.4], point={"loss.margin": 0.1}, status="stopped"),
        trial_of(1, [0.9], point={"loss.margin": 0.11}, status="failed"),
        Trial(2, {"loss.margin": 0.12}, "failed"),
    ]
    study = study_of(space, trials, ["robust_accuracy", "clean_accuracy"])
    assert [trial.values for trial in study.trials] == [[0.5, pytest.approx(0.75)], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_another_attempt_draws_other_points(searcher: str) -> None:
    space = space_of({"loss.margin": {"low": 0.01, "high": 0.2}}, searcher=searcher)

    def draw(num_before: int) -> float:
        study = optuna.create_study(sampler=sampler_of(space, num_before))
        return float(study.ask(distributions(space)).params["loss.margin"])

    assert draw(0) == draw(0)
    assert draw(0) != draw(3)
