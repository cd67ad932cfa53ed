"""What a campaign reads from a log, and the page it writes; `python -m tests.chaos` plays the faults themselves."""

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.campaign import Result, load, recovery, save, write_page
from tests.chaos.faults import FAULTS
from tests.chaos.soak import Sample, growth, part


def step(time: float, number: int) -> dict[str, Any]:
    return {"event": "step", "time": time, "step": number}


def test_recovery_is_the_first_new_step_after_the_last_restart() -> None:
    records = [step(1, 1), step(2, 2), step(3, 3), step(4.1, 4)]  # the last was on its way when the fault struck, at 4
    records += [{"event": "start", "time": 20, "resumed_from": "/s/step-000000002"}, step(21, 3), step(22, 4)]
    records += [step(23.5, 5)]
    assert recovery(records, 4) == (19.5, 2)
    assert recovery([step(1, 1), step(7.5, 2), step(8, 3)], 5) == (2.5, 0)


def test_the_page_has_a_row_for_each_fault_and_names_what_did_not_recover(tmp_path: Path) -> None:
    page, path = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("before\n<!-- campaign: begin -->\nold\n<!-- campaign: end -->\nafter\n")
    first, second = list(FAULTS)[:2]
    results = [Result(0, first, "abc", "", 4.0, 1, 9.0), Result(1, second, "abc", "lost", float("nan"), 0, 9.0),
               Result(12, first, "abc", "", 6.0, 3, 9.0)]  # fmt: skip
    save(path, results)
    assert load(path)[::2] == results[::2]
    write_page(load(path), page)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "| 0, 12 | 2 of 2 | 5 (6) | 2 (3) |" in text
    assert "| **all** | 3 | 2 of 3 | 5 (6) | 2 (3) |" in text
    assert f"- seed 1, {second}: lost" in text


def test_growth_counts_after_the_warm_up() -> None:
    flat = [10, 60, 100, 100, 100, 100, 100, 100, 100, 100]
    assert growth(flat) == 0
    assert growth([*flat[:8], 110, 110]) == pytest.approx(0.1)
    samples = [Sample(step, 2**20 * used, 7, 2**20) for step, used in enumerate(flat)]
    assert "| MB of memory | 100 | 100 | +0.0% |" in part(samples, 3, 60)
