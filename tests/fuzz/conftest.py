"""With TLA_TEST_PAGE=docs/reliability.md, the whole suite writes how its cases ended there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.harness import JUDGED, SEED

PAGE = os.environ.get("TLA_TEST_PAGE")
KINDS = {
    "test_configurations": "bad configurations",
    "test_data_files": "damaged data files",
    "test_checkpoints": "damaged checkpoints, models and files of weights",
}


@pytest.fixture(autouse=True)
def _judged(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Hand this test's cases to the process that reports them."""
    JUDGED.clear()
    yield
    if JUDGED:
        ended = JUDGED.values()
        refused, slowest = sum(each.code is not None for each in ended), max(each.seconds for each in ended)
        record_property("judged", (len(ended), refused, slowest))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if PAGE is None or config.option.markexpr != "fuzz" or terminalreporter.stats.get("failed"):
        return
    from tests.chaos.campaign import commit, write_part

    lines = ["| cases | number | refused with one message | accepted | slowest |", "|---" * 5 + "|"]
    for name, words in KINDS.items():
        ended = [each for each in terminalreporter.stats[""] if each.when == "teardown" and name in each.nodeid]
        properties = [dict(each.user_properties) for each in ended]
        judged = [each["judged"] for each in properties if "judged" in each]
        count, refused = (sum(each[column] for each in judged) for column in range(2))
        slowest = max(each[2] for each in judged)
        lines.append(f"| {words} | {count:,} | {refused:,} | {count - refused:,} | {slowest:.1f} s |")
    made = f"Made by `make fuzz` at {commit()}, seed {SEED}; the slowest in seconds of CPU time."
    write_part(Path(PAGE), "fuzz", "\n".join([*lines, "", made]) + "\n")
