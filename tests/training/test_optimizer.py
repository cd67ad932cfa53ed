"""Learning-rate factors against tables worked out by hand."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tla_service.config.training import ScheduleConfig
from tla_service.training.optimizer import learning_rate_factor


def factors(steps: list[int], total: int, steps_per_epoch: int = 1, **schedule: Any) -> list[float]:
    return [learning_rate_factor(ScheduleConfig(**schedule), step, steps_per_epoch, total) for step in steps]


def test_constant() -> None:
    assert factors([0, 1, 50, 99], 100, 10) == [1.0] * 4


def test_papers_cifar_schedule() -> None:
    """0.1, then 0.01 at 50,000 iterations, stopping at 55,000."""
    found = factors([0, 1, 49_999, 50_000, 54_999], 55_000, 980, name="piecewise", unit="step", milestones=(50_000,))
    rates = [0.1 * factor for factor in found]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01])


def test_papers_tiny_imagenet_schedule() -> None:
    """0.1, then 0.01 at epoch 110 and 0.001 at 130, in epochs of 391 steps."""
    epoch = 391
    steps = [0, 110 * epoch - 1, 110 * epoch, 130 * epoch - 1, 130 * epoch, 150 * epoch - 1]
    found = factors(steps, 150 * epoch, epoch, name="piecewise", unit="epoch", milestones=(110, 130))
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_authors_schedule_with_another_factor() -> None:
    schedule = {"name": "piecewise", "unit": "step", "milestones": (2, 5, 6), "factor": 0.5}
    assert factors(list(range(8)), 8, 3, **schedule) == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.125, 0.125]


def test_milestone_at_the_first_step_counts() -> None:
    assert factors([0, 1], 2, 1, name="piecewise", unit="step", milestones=(0,)) == [0.1, 0.1]


def test_cosine() -> None:
    found = factors([0, 25, 50, 75, 100], 100, 7, name="cosine")
    low, high = (1 - math.sqrt(0.5)) / 2, (1 + math.sqrt(0.5)) / 2
    assert found == pytest.approx([1, high, 0.5, low, 0], abs=1e-12)


def test_cyclic() -> None:
    assert factors([0, 10, 20, 40, 70, 85, 100], 100, 7, name="cyclic", peak=0.4) == pytest.approx(
        [0, 0.25, 0.5, 1, 0.5, 0.25, 0]
    )
    assert factors([0, 5, 10, 55, 100], 100, 7, name="cyclic", peak=0.1) == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.mark.parametrize(("total", "peak"), [(200, 0.3), (37, 0.25), (2, 0.9), (1, 0.3)])
def test_one_cycle_is_torchs(total: int, peak: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=peak, cycle_momentum=False
    )
    expected = []
    for _ in range(total):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        if len(expected) < total:
            theirs.step()
    found = factors(list(range(total)), total, 7, name="one_cycle", peak=peak)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if total == 200:
        assert found.index(max(found)) == peak * total - 1
        assert (found[0], found[-1]) == pytest.approx((1 / 25, 4e-6))


def test_warmup_in_steps_and_in_epochs() -> None:
    assert factors([0, 1, 2, 3, 4, 50], 100, 10, unit="step", warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1]
    in_epochs = factors([0, 9, 19, 20, 50], 100, 10, unit="epoch", warmup=2)
    assert in_epochs == pytest.approx([1 / 20, 10 / 20, 1, 1, 1])
    half_an_epoch = factors([0, 1, 4, 5], 100, 10, unit="epoch", warmup=0.5)
    assert half_an_epoch == pytest.approx([0.2, 0.4, 1, 1])


def test_warmup_multiplies_the_shape() -> None:
    schedule = {"name": "piecewise", "unit": "step", "milestones": (2,), "factor": 0.1}
    assert factors([0, 1, 2, 3], 4, 1, warmup=4, **schedule) == pytest.approx([0.25, 0.5, 0.075, 0.1])
    cosine = factors([0, 50], 100, 1, name="cosine", unit="step", warmup=10)
    assert cosine == pytest.approx([0.1, 0.5])


schedules = st.builds(
    ScheduleConfig,
    name=st.sampled_from(["constant", "piecewise", "cosine", "cyclic"]),
    milestones=st.lists(st.integers(0, 400), min_size=1, max_size=4, unique=True).map(lambda m: tuple(sorted(m))),
    unit=st.sampled_from(["epoch", "step"]),
    factor=st.floats(0.01, 0.99),
    warmup=st.floats(0, 50),
    peak=st.floats(0.01, 0.99),
)


@given(schedules, st.integers(1, 40), st.integers(1, 400), st.data())
def test_factor_lies_between_zero_and_one(
    schedule: ScheduleConfig, steps_per_epoch: int, total: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, total))
    found = learning_rate_factor(schedule, step, steps_per_epoch, total)
    assert isinstance(found, float)
    assert 0 <= found <= 1
    # A pure function of the step: asked again after others, it says the same.
    learning_rate_factor(schedule, total - step, steps_per_epoch, total)
    assert learning_rate_factor(schedule, step, steps_per_epoch, total) == found


@given(schedules, st.integers(1, 40), st.integers(2, 200))
def test_shapes_rise_and_fall_where_they_should(schedule: ScheduleConfig, steps_per_epoch: int, total: int) -> None:
    plain = schedule.model_copy(update={"warmup": 0.0})
    found = [learning_rate_factor(plain, step, steps_per_epoch, total) for step in range(total + 1)]
    changes = [after - before for before, after in pairwise(found)]
    if plain.name == "cyclic":
        top = math.ceil(plain.peak * total - 1e-9)
        assert all(change >= -1e-12 for change in changes[: top - 1])
        assert all(change <= 1e-12 for change in changes[top:])
        assert found[0] == 0
        assert found[-1] == pytest.approx(0, abs=1e-12)
    else:
        assert found[0] == 1 or (plain.name == "piecewise" and 0 in plain.milestones)
        assert all(change <= 1e-12 for change in changes)


@given(schedules, st.integers(1, 40), st.integers(1, 200), st.data())
def test_warmup_only_ever_lowers(
    schedule: ScheduleConfig, steps_per_epoch: int, total: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, total))
    plain = schedule.model_copy(update={"warmup": 0.0})
    warm, cold = (learning_rate_factor(which, step, steps_per_epoch, total) for which in (schedule, plain))
    assert warm <= cold
    unit = steps_per_epoch if schedule.unit == "epoch" else 1
    if step + 1 >= schedule.warmup * unit:
        assert warm == cold


@pytest.mark.parametrize("name", ["constant", "cosine", "cyclic", "one_cycle"])
def test_a_run_of_one_step(name: str) -> None:
    assert 0 <= factors([0], 1, 1, name=name, warmup=5)[0] <= 1
