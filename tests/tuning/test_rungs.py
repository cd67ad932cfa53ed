"""Successive halving against Ray Tune's own, on random courses of many trials."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.tuning.conftest import trial_of
from tla_service.tuning.rungs import is_behind, milestones, rung_reached
from tla_service.tuning.trial import Trial


def test_milestones() -> None:
    assert milestones(3, 3, 40) == [3, 9, 27]
    assert milestones(3, 3, 27) == [3, 9]
    assert milestones(5, 2, 40) == [5, 10, 20]
    assert milestones(40, 3, 40) == []


def test_a_report_reaches_the_highest_milestone_it_passes() -> None:
    rungs = milestones(3, 3, 40)
    assert rung_reached(trial_of(0, [0.1] * 2), rungs) is None
    assert rung_reached(trial_of(0, [0.1] * 3), rungs) == 3
    assert rung_reached(trial_of(0, [0.1] * 4), rungs) is None
    assert rung_reached(trial_of(0, [0.1] * 2, every=5), rungs) == 9
    assert rung_reached(trial_of(0, [0.1], every=10), rungs) == 9


def test_the_first_at_a_milestone_goes_on_and_a_worse_second_does_not() -> None:
    first = trial_of(0, [0.5])
    assert not is_behind(first, [first], 1, "robust_accuracy", 3)
    worse, better = trial_of(1, [0.4]), trial_of(2, [0.6])
    assert is_behind(worse, [first, worse], 1, "robust_accuracy", 3)
    assert not is_behind(better, [first, worse, better], 1, "robust_accuracy", 3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [2, 3])
def test_decisions_equal_ray_tunes(seed: int, factor: int) -> None:
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    epochs, rng = 27, np.random.default_rng(seed)
    theirs = AsyncHyperBandScheduler(
        time_attr="epochs", metric="value", mode="max", max_t=epochs, grace_period=1, reduction_factor=factor,
        stop_last_trials=False,
    )  # fmt: skip
    rungs = milestones(1, factor, epochs)
    trials = [Trial(number, {}) for number in range(12)]
    curves = np.maximum.accumulate(rng.random((12, epochs)), axis=1)
    stubs = [SimpleNamespace(trial_id=str(number)) for number in range(12)]
    for stub in stubs:
        theirs.on_trial_add(None, stub)
    alive, stopped = list(range(12)), 0
    while alive:
        number = int(rng.choice(alive))
        trial = trials[number]
        epoch = trial.epochs_done
        value = float(curves[number, epoch])
        trial.add_report({"epoch": float(epoch), "validation/robust_accuracy": value, "validation/clean_accuracy": 0.5})
        milestone = rung_reached(trial, rungs)
        ours = milestone is not None and is_behind(trial, trials, milestone, "robust_accuracy", factor)
        decision = theirs.on_trial_result(None, stubs[number], {"epochs": epoch + 1, "value": value})
        if epoch + 1 < epochs:
            assert ours == (decision == TrialScheduler.STOP), (number, epoch)
        stopped += ours
        if ours or epoch + 1 == epochs:
            alive.remove(number)
    assert stopped > 3
