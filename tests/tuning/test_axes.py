"""Constraints compute what they say, and nothing else."""

import pytest

from tla_service.errors import ConfigError
from tla_service.tuning.axes import Constraint

FIELDS = {
    "training": {"global_batch_size": 100},
    "mining": {"pool_size": 250},
    "method": "tla",
    "seed": 3,
    "none": None,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mining.pool_size >= 2 * training.global_batch_size", True),
        ("mining.pool_size >= 3 * training.global_batch_size", False),
        ("mining.pool_size / training.global_batch_size == 2.5", True),
        ("1 < seed < 5", True),
        ("1 < seed < 3", False),
        ("-seed + 4 != 1", False),
        ("method == 'tla'", True),
        ("1 - none <= 2", False),
        ("mining.pool_size - training.global_batch_size > 149", True),
    ],
)
def test_what_holds(text: str, expected: bool) -> None:
    assert Constraint(text).holds(FIELDS) is expected


@pytest.mark.parametrize(
    "text",
    ["", "1 +", "mining.pool_size", "seed in (1, 2)", "open('x') == 1", "seed ** 9 > 1", "nothing > 1", "seed.bit > 1",
     "(lambda: 1)() == 1", "seed > [1]", "method > 1", "seed / 0 > 1", "5 < seed < nothing",
     "(" * 500 + "1" + ")" * 500 + " > 1"],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.constraints="):
        Constraint(text).holds(FIELDS)
