"""Points and the runs they stand for."""

import math
from typing import Any

import numpy as np
import pytest

from tests.tuning.conftest import run_config, space_of
from tla_service.config import RunConfig
from tla_service.config.loading import load_settings, read_settings
from tla_service.errors import ConfigError
from tla_service.results.runs import table_space
from tla_service.results.settings import ReproduceSettings
from tla_service.training.optimizer import learning_rate_factor

BATCH = "training.global_batch_size"


def test_runs_that_are_compared_have_a_fixed_number_of_workers() -> None:
    table = read_settings(ReproduceSettings, ["--table", "digits", "--scaling.num_workers", "[1, 2]"])
    for make in (lambda: space_of(run=run_config(scaling={"num_workers": [1, 2]})), lambda: table_space(table, ())):
        with pytest.raises(ConfigError, match=r"^scaling\.num_workers=\[1, 2\]: runs .* not compare; give one number"):
            make()


def test_trials_wait_for_their_validation() -> None:
    with pytest.raises(ConfigError, match=r"^scaling\.async_validation=True: trials are decided by .*; leave it out"):
        space_of(run=run_config(scaling={"async_validation": True}))


def test_the_default_space_is_the_papers_around_the_runs_own_sizes() -> None:
    space = space_of()
    assert [axis.name for axis in space.axes] == [
        BATCH,
        "loss.triplet_weight",
        "loss.norm_weight",
        "loss.margin",
    ]
    assert space.axes[0].choices == (32, 64, 128)
    assert (space.axes[1].low, space.axes[1].high, space.axes[1].log) == (0.1, 8, True)
    separate = space_of(run=run_config(mining={"pool": "separate", "pool_size": 100}))
    assert separate.axes[-1].choices == (50, 100, 200, 400)
    assert [axis.name for axis in space_of(run=run_config(method="at")).axes] == [BATCH]


def test_random_points_stay_in_their_ranges_and_fill_them() -> None:
    space = space_of(
        {"loss.norm_weight": {"low": 1e-5, "high": 1e-2, "log": True}, "attack.num_steps": {"low": 1, "high": 3}}
    )
    rng = np.random.default_rng(0)
    points = [space.random(rng) for _ in range(400)]
    weights = [point["loss.norm_weight"] for point in points if point is not None]
    assert len(weights) == 400
    assert min(weights) >= 1e-5
    assert max(weights) <= 1e-2
    # On a logarithmic scale a third of the draws lies in each of the three decades.
    inside = [sum(10**low <= weight < 10 ** (low + 1) for weight in weights) for low in (-5, -4, -3)]
    assert all(abs(count - 400 / 3) < 40 for count in inside)
    steps = [point["attack.num_steps"] for point in points if point is not None]
    assert set(steps) == {1, 2, 3}
    assert all(type(step) is int for step in steps)


@pytest.mark.parametrize(("rule", "rate"), [("linear", 0.2), ("sqrt", 0.1 * math.sqrt(2)), ("none", 0.1)])
def test_the_learning_rate_follows_the_batch_size_by_the_named_rule(rule: str, rate: float) -> None:
    space = space_of({BATCH: [64, 128]}, learning_rate_rule=rule)
    assert space.apply({BATCH: 128}).optimizer.learning_rate == pytest.approx(rate)
    assert space.apply({BATCH: 64}).optimizer.learning_rate == pytest.approx(0.1)


def test_what_is_counted_in_steps_follows_batch_size_and_length() -> None:
    run = run_config(
        training={"epochs": 10, "global_batch_size": 50, "max_steps": 1000},
        schedule={"name": "piecewise", "unit": "step", "milestones": [800, 900], "warmup": 100},
    )
    space = space_of({BATCH: [50, 100]}, run=run, trial_epochs=5)
    found = space.apply({BATCH: 100})
    assert (found.training.epochs, found.training.max_steps) == (5, 250)
    assert found.schedule.milestones == (200, 225)
    assert found.schedule.warmup == 25
    full = space.apply({BATCH: 100}, full_length=True)
    assert (full.training.epochs, full.training.max_steps) == (10, 500)
    assert full.schedule.milestones == (400, 450)


def test_milestones_that_meet_in_a_short_trial_lower_the_rate_as_often_as_in_the_run() -> None:
    run = run_config(
        training={"epochs": 100}, schedule={"name": "piecewise", "milestones": [75, 80, 90], "factor": 0.1}
    )
    schedule = space_of({"loss.margin": [0.1]}, run=run, trial_epochs=5).apply({"loss.margin": 0.1}).schedule
    assert schedule.milestones == (4, 4, 4)
    assert learning_rate_factor(schedule, 40, steps_per_epoch=10, total_steps=50) == pytest.approx(1e-3)


def test_all_trials_are_measured_by_the_attack_of_the_run() -> None:
    run = load_settings(["--preset", "digits"]).run_config
    space = space_of({"attack.epsilon": [0.05, 0.15]}, run=run)
    found = space.apply({"attack.epsilon": 0.05})
    assert found.attack.epsilon == 0.05
    assert found.evaluation.validation.epsilon == 0.15
    assert {attack.epsilon for attack in found.evaluation.test.values()} == {0.15}
    # What is trained afterwards is evaluated as a run with these settings is.
    assert space.apply({"attack.epsilon": 0.05}, full_length=True).evaluation == run.evaluation


def test_a_point_of_the_runs_own_values_is_the_run() -> None:
    run = load_settings(["--preset", "cifar10", "--data.root", "/data"]).run_config
    space = space_of({BATCH: [50, 100], "loss.margin": {"low": 0.005, "high": 0.2}}, run=run)
    assert space.apply({BATCH: 50, "loss.margin": 0.03}, full_length=True) == run
    assert space.own_point() == {BATCH: 50, "loss.margin": 0.03}
    assert space_of({"optimizer.grad_clip": {"low": 0.5, "high": 5}}, run=run).own_point() is None  # it is off


def test_variants_set_several_fields_together() -> None:
    space = space_of(
        {
            "pool": {
                "variants": {"1": {"method": "tla_rn"}, "250": {"mining.pool": "separate", "mining.pool_size": 250}}
            },
            "seed": [0, 1],
        },
        searcher="grid",
    )
    assert len(space.grid()) == 4
    assert space.apply({"pool": "1", "seed": 1}).method == "tla_rn"
    assert space.apply({"pool": "250", "seed": 1}).mining.pool_size == 250


def test_constraints_and_the_runs_own_rules_thin_out_a_grid() -> None:
    run = run_config(mining={"pool": "separate"}, scaling={"num_workers": 4})
    space = space_of(
        {BATCH: [64, 128], "mining.pool_size": [62, 512], "mining.scope": ["worker", "global"]},
        run=run,
        searcher="grid",
        constraints=[f"mining.pool_size <= 4 * {BATCH}"],
    )
    # A pool of 62 is not divisible among four workers; 512 is over 4 x 64.
    expected = [(64, 62, "worker"), (128, 62, "worker"), (128, 512, "worker"), (128, 512, "global")]
    assert [tuple(point.values()) for point in space.grid()] == expected


def test_where_a_constraint_cannot_be_computed_it_is_violated() -> None:
    """The run's own `grad_clip` is none; an error at one point would end the search in its midst."""
    constraints = [f"1 / ({BATCH} - 32) > 0", "optimizer.grad_clip >= 1"]
    space = space_of({BATCH: [32, 128], "optimizer.grad_clip": [None, 1]}, searcher="grid", constraints=constraints)
    assert space.grid() == [{BATCH: 128, "optimizer.grad_clip": 1.0}]


REFUSED = {
    "unknown field": (
        {"loss.margn": [0.1]},
        {},
        "sweep.space.loss.margn: the run has no field loss.margn; did you mean",
    ),
    "empty list": ({"loss.margin": []}, {}, r"sweep.space.loss.margin=\[\]: no values"),
    "no variants": ({"pool": {"variants": {}}}, {}, r"sweep.space.pool=\[\]: no values"),
    "bounds swapped": (
        {"loss.margin": {"low": 0.2, "high": 0.1}},
        {},
        "sweep.space.loss.margin.low=0.2: not below high=0.1",
    ),
    "zero on a log scale": (
        {"loss.margin": {"low": 0, "high": 0.1, "log": True}},
        {},
        "sweep.space.loss.margin.low=0: a logarithmic scale has no zero",
    ),
    "half a range": ({"loss.margin": {"low": 0}}, {}, "a range has a low and a high end"),
    "nothing": ({"loss.margin": {}}, {}, "needs one of"),
    "range and list": ({"loss.margin": {"low": 0, "high": 0.1, "values": [0.1]}}, {}, "needs one of"),
    "range of words": ({"method": {"low": 0, "high": 1}}, {}, "sweep.space.method: is not a number"),
    "section": ({"loss": [1]}, {}, "sweep.space.loss: is a section"),
    "value outside": (
        {"loss.margin": [0.1, 2]},
        {},
        "sweep.space.loss.margin=2: input should be less than or equal to 1",
    ),
    "end outside": ({"loss.margin": {"low": 0.5, "high": 2}}, {}, "sweep.space.loss.margin=2.0: input should be less"),
    "no such method": ({"method": ["tla", "tlq"]}, {}, "sweep.space.method=tlq: not one of"),
    "what is measured": ({"evaluation.validation.num_steps": [1, 2]}, {}, "must be the same for all trials"),
    "where it runs": ({"scaling.num_workers": [1, 2]}, {}, "must be the same for all trials"),
    "the network's code": ({"model.code": ["a", "b"]}, {}, "must be the same for all trials"),
    "which images are validated on": ({"data.validation": ["val", "dev"]}, {}, "must be the same for all trials"),
    "twice": ({"loss.margin": [0.1, 0.1]}, {}, "a value is in it twice"),
    "two axes set one field": (
        {"loss.margin": [0.1], "kind": {"variants": {"a": {"loss.margin": 0.2}}}},
        {},
        "sweep.space.kind: loss.margin is set by loss.margin too",
    ),
    "constraint on nothing": ({}, {"constraints": ["loss.margn > 0"]}, "the run has no field loss.margn"),
    "constraint that is none": ({}, {"constraints": ["loss.margin"]}, "not a comparison"),
    "constraint with code": (
        {},
        {"constraints": ["__import__('os').system('true') == 0"]},
        "is not a number",
    ),
    "constraint between kinds": ({}, {"constraints": ["method < 3"]}, "cannot be computed"),
    "nothing allowed": (
        {"loss.margin": {"low": 0.1, "high": 0.2}},
        {"constraints": ["loss.margin > 0.5"]},
        r"sweep.constraints: none of 1000 random points is allowed; .* breaks: loss.margin > 0.5",
    ),
    "no grid point allowed": (
        {"loss.margin": [0.1]},
        {"searcher": "grid", "constraints": ["loss.margin > 0.5"]},
        "sweep.constraints: no point of the grid is allowed; .* breaks: loss.margin > 0.5",
    ),
    "grid over a range": ({"loss.margin": {"low": 0, "high": 0.1}}, {"searcher": "grid"}, "a grid needs a list"),
    "test set in a search": ({}, {"measure_test": True}, "test images would take part in a search"),
    "picture along a range": (
        {"loss.margin": {"low": 0, "high": 0.1}},
        {"picture": "margin"},
        "sweep.picture=margin: its x axis is the first of the space, and loss.margin is a range",
    ),
    "a group called like a column of the table": (
        {"epochs": {"variants": {"one": {"loss.margin": 0.1}}}},
        {},
        "sweep.space.epochs: the table of trials has a column of this name",
    ),
    "lengths where all trials have one": (
        {"schedule": {"variants": {"long": {"training.epochs": 54}}}},
        {"trial_epochs": 3},
        "sweep.trial_epochs=3: all trials have this length, and the space has training.epochs",
    ),
    "grace beyond the trial": ({}, {"grace_epochs": 28}, "sweep.grace_epochs=28: longer than a trial of 27 epochs"),
}


@pytest.mark.parametrize(("space", "sweep", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_spaces_are_refused(space: dict[str, object], sweep: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of(space, **sweep)


def test_every_point_is_a_valid_run() -> None:
    space = space_of(
        run=run_config(mining={"pool": "separate", "pool_size": 104, "scope": "global"}, scaling={"num_workers": 8})
    )
    rng = np.random.default_rng(1)
    for _ in range(50):
        point = space.random(rng)
        assert point is not None
        assert isinstance(space.apply(point), RunConfig)
        assert point["mining.pool_size"] % 8 == 0


@pytest.mark.parametrize(
    ("space", "subject", "reason"),
    [
        ({"attack.epsilon": ["4/255", 8]}, "attack.epsilon=8", "outside (0, 1]; write 8/255"),
        ({"attack.epsilon": {"low": 0.01, "high": 8}}, "attack.epsilon=7.9", "outside (0, 1]; write 7.9"),
        ({"attack.step_size": [0.01, 2]}, "attack.step_size=2", "over twice attack.epsilon"),
        ({"attack.epsilon": [0.1, 0.2], "attack.step_size": [0.01, 2]}, "attack.step_size=2", "over twice"),
        ({"radius": {"variants": {"4": {"attack.epsilon": "4/255"}, "8": {"attack.epsilon": 8}}}}, "radius=8", "8/255"),
    ],
)
def test_a_length_that_makes_no_sense_in_any_point_is_not_left_out_silently(
    space: dict[str, object], subject: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(space)
    assert str(caught.value).startswith(f"sweep.space.{subject}")
    assert reason in str(caught.value)


def test_lengths_that_go_together_in_some_points_are_kept() -> None:
    space = space_of({"attack.epsilon": [0.01, 0.3], "attack.step_size": [0.005, 0.1]}, searcher="grid")
    assert len(space.grid()) == 3


def test_values_are_numbers_however_they_are_written() -> None:
    space = space_of({"attack.epsilon": ["4/255", "1e-2"], BATCH: ["64"], "data.flip": [True, False]})
    assert [axis.choices for axis in space.axes] == [(4 / 255, 0.01), (64,), (True, False)]
    with pytest.raises(ConfigError, match="a value is in it twice"):
        space_of({"attack.epsilon": ["51/255", 0.2]})
    run = run_config(attack={"epsilon": 4 / 255, "step_size": 1 / 255})
    assert space_of({"attack.epsilon": ["4/255", "8/255"]}, run=run).own_point() == {"attack.epsilon": 4 / 255}
    variants = {"small": {"attack.epsilon": "4/255"}, "large": {"attack.epsilon": "8/255"}}
    assert space_of({"radius": {"variants": variants}}, run=run).own_point() == {"radius": "small"}


@pytest.mark.parametrize(
    ("own", "name", "values"),
    [
        ({"model": {"name": "network:build"}}, "model.name", ["network:build", "digits_cnn"]),
        ({"mining": {"miner": "m:f"}}, "mining.miner", [None, "m:f"]),
        ({"loss": {"extra": {"m:f": 0.5}}}, "loss.extra", [{}, {"m:f": 0.5}]),
        ({"attack": {"kind": "m:f"}}, "attack.kind", ["pgd", "m:f"]),
    ],
    ids=str,
)
def test_own_code_is_compared_with_what_the_package_has(own: dict[str, Any], name: str, values: list[Any]) -> None:
    own = {section: fields | {"code": "folder"} if section == "model" else fields for section, fields in own.items()}
    run = run_config(**({"model": {"name": "digits_cnn", "code": "folder"}} | own))
    space = space_of({name: values}, run=run, searcher="grid")
    runs = [space.apply(point) for point in space.grid()]
    assert [each.model.code for each in runs] == ["folder" if each.uses_own_code else None for each in runs]
    assert len(runs) == 2


def test_a_choice_that_no_point_can_have_is_refused() -> None:
    run = run_config(loss={"robust_term": "trades"})
    with pytest.raises(ConfigError, match=r"^sweep\.space\.method=at: no point can have this value \(loss.robust_term"):
        space_of({"method": ["at", "tla"]}, run=run, searcher="grid")
    space = space_of({"method": ["at", "tla"], "loss.robust_term": ["auto", "trades"]}, searcher="grid")
    assert len(space.grid()) == 3
