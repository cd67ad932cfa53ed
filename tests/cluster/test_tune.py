"""The glue between sweeps and Ray Tune: what is suggested, and what is stopped."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tests.tuning.conftest import run_config, space_of, trial_of
from tla_service.cluster.tune import Search, scheduler
from tla_service.errors import ConfigError
from tla_service.tuning.trials import Trial

SPACE = {"loss.margin": {"low": 0.005, "high": 0.2}, "loss.triplet_weight": {"low": 0.1, "high": 8, "log": True}}
EPOCHS = 27


def goodness(point: dict[str, float]) -> float:
    """Highest, 1, at margin 0.05 and triplet weight 2."""
    distance = (point.get("loss.margin", 0.05) - 0.05) ** 2 / 0.01 + np.log(
        point.get("loss.triplet_weight", 2) / 2
    ) ** 2 / 4
    return float(np.exp(-distance))


# ------------------------------------------------------------------------------------------------ what is suggested


def suggest(search: Any, count: int, value: Callable[[dict[str, float]], float] = goodness) -> list[Trial]:
    """So many trials, one after another, until there are no more."""
    trials = []
    for number in range(count):
        config = search.suggest(str(number))
        if config == Searcher.FINISHED:
            break
        point = config["trial"]["point"]
        search.on_trial_result(str(number), {"robust_accuracy": 0.0, "training_iteration": 1})
        search.on_trial_complete(str(number), {"robust_accuracy": value(point), "clean_accuracy": 0.5})
        trials.append(trial_of(config["trial"]["number"], [value(point)], point=point, status="finished"))
    return trials


def test_the_private_names_that_we_use_of_optuna_search_are_there() -> None:
    search = Search(space_of(SPACE), [])
    assert isinstance(search, OptunaSearch)
    search.suggest("a")
    assert search._ot_trials.keys() == {"a"}
    assert search._ot_study.trials[0].params.keys() == SPACE.keys()


def test_suggestions_satisfy_constraints_and_the_runs_own_rules() -> None:
    space = space_of(SPACE, startup_trials=2, constraints=["loss.margin < 0.02 * loss.triplet_weight"])
    trials = suggest(Search(space, []), 6)
    assert len(trials) == 6
    assert all(trial.point["loss.margin"] < 0.02 * trial.point["loss.triplet_weight"] for trial in trials)


def test_a_small_allowed_corner_is_found() -> None:
    """The sampler alone would offer a hundred points in vain."""
    space = space_of(SPACE, own_first=False, constraints=["loss.margin > 0.199"])
    assert len(suggest(Search(space, []), 5)) == 5


def test_no_point_is_tried_twice_and_a_space_may_run_out() -> None:
    space = space_of({"loss.margin": [0.01, 0.1], "seed": [0, 1, 2]})
    trials = suggest(Search(space, []), 20)
    assert len({str(trial.point) for trial in trials}) == len(trials) == 6
    assert [trial.number for trial in trials] == list(range(6))


def test_a_group_may_have_a_slash_in_its_name() -> None:
    """Ray Tune nests values at slashes."""
    variants = {"low": {"loss.margin": 0.01}, "high": {"loss.margin": 0.1}}
    trials = suggest(Search(space_of({"loss/margin": {"variants": variants}}), []), 3)
    assert {trial.point["loss/margin"] for trial in trials} == {"low", "high"}


def test_the_first_trial_is_the_run_itself() -> None:
    run = run_config(loss={"margin": 0.05, "triplet_weight": 2})
    space = {"loss.margin": {"low": 0.005, "high": 0.2}, "loss.triplet_weight": [1, 2]}
    own = {"loss.margin": 0.05, "loss.triplet_weight": 2}
    assert suggest(Search(space_of(space, run=run), []), 1)[0].point == own
    assert suggest(Search(space_of(space, run=run, own_first=False), []), 1)[0].point != own
    variants = {"kind": {"variants": {"a": {"loss.margin": 0.1}, "b": {"loss.margin": 0.05}}}}
    assert suggest(Search(space_of(variants, run=run), []), 1)[0].point == {"kind": "b"}
    elsewhere = suggest(Search(space_of({"loss.margin": {"low": 0.1, "high": 0.2}}, run=run), []), 1)
    assert elsewhere[0].point["loss.margin"] >= 0.1


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_an_attempt_takes_up_unfinished_trials_first_and_repeats_no_ended_one(name: str) -> None:
    space = space_of(SPACE, searcher=name, startup_trials=2)
    before = suggest(Search(space, []), 5)
    before[1].status, before[3].status, before[4].status = "running", "running", "failed"
    after = suggest(Search(space, before), 6)
    assert [(trial.number, trial.point) for trial in after[:2]] == [(1, before[1].point), (3, before[3].point)]
    assert [trial.number for trial in after[2:]] == [5, 6, 7, 8]
    assert not [trial for trial in after[2:] if trial.point in [each.point for each in before]]


def test_tpe_learns_over_attempts() -> None:
    trials: list[Trial] = []
    for _ in range(5):
        trials += suggest(Search(space_of(SPACE), trials), 5)
    values = [trial.value("robust_accuracy") or 0.0 for trial in trials]
    assert np.mean(values[15:]) > np.mean(values[:10]) + 0.15


def test_two_objectives_are_searched_together() -> None:
    space = space_of(SPACE, startup_trials=2, objectives=["robust_accuracy", "clean_accuracy"])
    before = suggest(Search(space, []), 5)
    before[1].status = "failed"
    assert len(suggest(Search(space, before), 4)) == 4


def test_the_searcher_can_be_written_down_as_ray_tune_does(tmp_path: Path) -> None:
    search = Search(space_of(SPACE), [])
    suggest(search, 2)
    search.save(str(tmp_path / "state"))
    assert (tmp_path / "state").stat().st_size > 0


# ------------------------------------------------------------------------------------------------ what is stopped


def stops(asha: Any, name: str, curve: list[float]) -> int | None:
    """The epoch at which a new trial, whose last is that of its curve, is stopped; None if it is not."""
    stub: Any = SimpleNamespace(trial_id=name, config={"trial": {"number": 99}})
    asha.on_trial_add(None, stub)
    for epoch, value in enumerate(np.maximum.accumulate(curve)):
        result = {"epochs": epoch + 1, "total_epochs": len(curve), "robust_accuracy": float(value)}
        if asha.on_trial_result(None, stub, result) == TrialScheduler.STOP:
            return epoch + 1
    return None


@pytest.mark.parametrize("seed", range(5))
def test_asha_that_is_fed_earlier_curves_decides_like_one_that_saw_them(seed: int) -> None:
    space, rng = space_of(SPACE, grace_epochs=3), np.random.default_rng(seed)
    curves = rng.random((12, EPOCHS))
    live = scheduler(space, [], EPOCHS)
    ended = []
    for number, curve in enumerate(curves):
        epoch = stops(live, f"live-{number}", list(curve))
        assert stops(scheduler(space, ended, EPOCHS), "new", list(curve)) == epoch
        ended.append(trial_of(number, list(curve[:epoch]), status="stopped" if epoch else "finished"))
    assert 0 < sum(trial.status == "stopped" for trial in ended) < 12


def test_a_fresh_asha_would_let_a_trial_far_behind_go_on() -> None:
    space = space_of(SPACE, grace_epochs=3)
    ended = [trial_of(number, [0.8] * EPOCHS, status="finished") for number in range(3)]
    assert stops(scheduler(space, ended, EPOCHS), "new", [0.1] * EPOCHS) == 3
    assert stops(scheduler(space, [], EPOCHS), "new", [0.1] * EPOCHS) is None


def test_a_resumed_trial_is_compared_where_it_was_and_not_where_it_resumes() -> None:
    """What it had reached at epoch 20 would raise the bar for trials that get to epoch 9."""
    before = [trial_of(0, list(np.linspace(0.01, 0.2, 20)))]
    asha: Any = scheduler(space_of(SPACE, grace_epochs=3), before, EPOCHS)
    resumed: Any = SimpleNamespace(trial_id="a", config={"trial": {"number": 0}})
    asha.on_trial_add(None, resumed)
    asha.on_trial_result(None, resumed, {"epochs": 20, "total_epochs": EPOCHS, "robust_accuracy": 0.2})
    rungs = {milestone: list(recorded.values()) for milestone, recorded in asha._brackets[0]._rungs}
    assert rungs == {3: [pytest.approx(0.03)], 9: [pytest.approx(0.09)]}


@pytest.mark.parametrize("grace", [1, 3, 9, 26])
def test_a_trial_that_reaches_its_last_epoch_is_not_stopped_there(grace: int) -> None:
    """With 27 epochs and a factor of 3 the last epoch would be a rung."""
    space = space_of(SPACE, grace_epochs=grace)
    ended = [trial_of(number, [0.1] * (EPOCHS - 1) + [0.9], status="finished") for number in range(3)]
    assert stops(scheduler(space, ended, EPOCHS), "new", [0.1] * EPOCHS) is None


@pytest.mark.parametrize("epochs", [3, 9])
def test_a_trial_that_is_shorter_than_the_run_is_not_stopped_at_its_end(epochs: int) -> None:
    ended = [trial_of(number, [0.9] * EPOCHS, status="finished") for number in range(3)]
    asha = scheduler(space_of(SPACE, grace_epochs=epochs), ended, EPOCHS)
    assert stops(asha, "short", [0.1] * epochs) is None
    assert stops(asha, "long", [0.1] * (epochs + 1)) == epochs


def test_the_grace_period_is_a_ninth_of_what_max_steps_leaves_of_a_trial() -> None:
    run = run_config(training={"epochs": 1000, "max_steps": 1790, "global_batch_size": 64})
    space = space_of(SPACE, run=run)
    assert (space.epochs(100), space.epochs(1), space_of(SPACE, run=run, trial_epochs=500).epochs(100)) == (18, 1000, 9)
    ended = [trial_of(number, [0.9] * 18, status="finished") for number in range(3)]
    assert stops(scheduler(space, ended, space.epochs(100)), "new", [0.1] * 18) == 2
    with pytest.raises(ConfigError, match=r"^sweep\.grace_epochs=20: longer than a trial of 18 epochs"):
        space_of(SPACE, run=run, grace_epochs=20).epochs(100)


def test_without_asha_every_trial_runs_to_its_end() -> None:
    assert scheduler(space_of(SPACE, scheduler="none"), [], EPOCHS) is None
    assert scheduler(space_of(SPACE, grace_epochs=EPOCHS), [], EPOCHS) is None


def test_a_trial_whose_last_validation_comes_after_the_last_rung_is_not_stopped_there() -> None:
    """Validated every fourth epoch, it passes the rungs of epochs 24 and 27 together, with its end."""
    asha: Any = scheduler(space_of(SPACE, grace_epochs=EPOCHS - 3), [], EPOCHS)
    for number, value in enumerate((0.9, 0.9, 0.9, 0.1)):
        stub: Any = SimpleNamespace(trial_id=f"t{number}", config={"trial": {"number": number}})
        asha.on_trial_add(None, stub)
        result = {"epochs": EPOCHS, "total_epochs": EPOCHS, "robust_accuracy": value}
        assert asha.on_trial_result(None, stub, result) == TrialScheduler.CONTINUE
    assert {*asha._brackets[0]._rungs[0][1].values()} == {0.9, 0.1}
