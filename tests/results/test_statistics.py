"""Intervals over seeds against closed forms, and methods compared seed by seed."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tla_service.evaluation.results import paired_difference
from tla_service.results.runs import Estimate, TableRun, read_row


def test_the_interval_over_seeds_is_students() -> None:
    found = Estimate.over_seeds([0.90, 0.92, 0.97])
    assert found is not None
    # t(0.975, 2) = 4.302653, s = 0.036056, / sqrt(3)
    reach = 4.302653 * math.sqrt(((0.93 - 0.90) ** 2 + (0.93 - 0.92) ** 2 + (0.97 - 0.93) ** 2) / 2) / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.93, 0.93 - reach, 0.93 + reach), abs=1e-6)
    assert Estimate.over_seeds([]) is None
    one = Estimate.over_seeds([0.5])
    assert one is not None
    assert math.isnan(one.low)


def test_methods_are_compared_on_the_seeds_they_share(tmp_path: Path, finished: Callable[..., None]) -> None:
    for seed, (tla, at) in enumerate([(0.60, 0.55), (0.80, 0.74), (0.70, 0.66)]):
        finished(tmp_path, f"tla-s{seed}", 0.9, tla)
        if seed != 1:
            finished(tmp_path, f"at-s{seed}", 0.9, at)
    rows = [read_row(m, [TableRun(f"{m}-s{seed}", m, seed) for seed in range(4)], tmp_path) for m in ("tla", "at")]
    assert [len(row.runs) for row in rows] == [3, 2]
    found = rows[0].minus(rows[1], "pgd100")
    assert found is not None
    assert found.value == pytest.approx(0.045)
    # The two differences, 0.05 and 0.04, lie 0.005 from their mean; t(0.975, 1) = 12.706205, s / sqrt(2) = 0.005.
    assert found.high - found.value == pytest.approx(12.706205 * 0.005, rel=1e-5)


def test_one_seed_is_compared_image_by_image(tmp_path: Path, finished: Callable[..., None]) -> None:
    finished(tmp_path, "tla-s0", 0.9, 0.7)
    finished(tmp_path, "at-s0", 0.9, 0.6)
    rows = [read_row(m, [TableRun(f"{m}-s0", m, 0)], tmp_path) for m in ("tla", "at")]
    found = rows[0].minus(rows[1], "pgd100")
    expected = paired_difference([True] * 700 + [False] * 300, [True] * 600 + [False] * 400)  # type: ignore[arg-type]
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.1, expected.low, expected.high))
    detection = rows[0].minus(rows[1], "detection")
    assert detection is not None
    assert math.isnan(detection.low)
