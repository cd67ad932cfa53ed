"""The guard, the spreads and the tables of the benchmark."""

import json
import runpy
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import Results, keep_ratios, read_ratios, read_results, worsened
from benchmarks.scaling_model import Cluster, efficiency
from benchmarks.timing import Spread, Times, peak_memory, take_turns
from tla_service.errors import UnavailableError

ROOT = Path(__file__).parents[2]


def ratio(median: float, low: float | None = None) -> dict[str, float | None]:
    return {"median": median, "low": median if low is None else low, "high": median, "bar": None}


@pytest.mark.parametrize(
    ("now", "low", "says"),
    [(1.0, 0.9, False), (1.09, 1.08, False), (1.12, 1.05, True), (1.12, 0.98, False), (0.5, 0.5, False)],
)
def test_the_guard_speaks_when_a_ratio_worsens_by_over_a_tenth(now: float, low: float, says: bool) -> None:
    lines = worsened({"AT over its floor": ratio(now, low), "new": ratio(9.0)}, {"AT over its floor": 1.0, "gone": 1.0})
    assert len(lines) == says
    if says:
        assert "AT over its floor: 1.120, was 1.000: 12 % worse" in lines[0]


def test_kept_ratios_stay_beside_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "ratios.json"
    assert read_ratios(path) == {}
    keep_ratios(path, {"first": ratio(1.0), "second": ratio(2.0)})
    keep_ratios(path, {"second": ratio(2.5)})
    assert read_ratios(path) == {"first": 1.0, "second": 2.5}


def test_stages_that_are_measured_again_take_the_place_of_the_earlier_ones(tmp_path: Path) -> None:
    def results(commit: str, **ratios: float) -> Results:
        facts = {"command": "python -m benchmarks", "commit": commit, "device": "one", "load before": 0.0}
        return Results(facts, {name: {"columns": [], "rows": [[commit]]} for name in ratios},
                       {name: ratio(value) for name, value in ratios.items()}, dict(ratios))  # fmt: skip

    path = tmp_path / "found.json"
    results("aaa", steps=1.0, scaling=2.0).write(path)
    results("bbb", scaling=3.0).on_top_of(read_results(path), ["scaling"]).write(path)
    results("ccc", mining=4.0).on_top_of(read_results(path), ["mining"]).write(path)
    found = read_results(path)
    assert found.raw == {"steps": 1.0, "scaling": 3.0, "mining": 4.0}
    assert {name: table["rows"][0][0] for name, table in found.tables.items()} == {
        "steps": "aaa", "scaling": "bbb", "mining": "ccc",
    }  # fmt: skip
    assert found.ratios["scaling"]["median"] == 3.0
    assert found.facts["commit"] == "aaa"
    assert {stage: run["commit"] for stage, run in found.facts["again"].items()} == {"scaling": "bbb", "mining": "ccc"}
    results("ddd", steps=5.0, scaling=6.0).on_top_of(found, ["steps", "scaling"], is_main=True).write(path)
    found = read_results(path)
    assert found.raw == {"steps": 5.0, "scaling": 6.0, "mining": 4.0}
    assert (found.facts["commit"], list(found.facts["again"])) == ("ddd", ["mining"])
    path.write_text('{"not": "results"}')
    with pytest.raises(UnavailableError, match="holds no results of a benchmark"):
        read_results(path)


@pytest.mark.parametrize(("column", "kept"), [("step", []), ("settings", [["small", "1"], ["small", "2"]])])
def test_another_network_keeps_the_rows_of_the_first(tmp_path: Path, column: str, kept: list[list[str]]) -> None:
    def results(*rows: list[str]) -> Results:
        facts = {"command": "python -m benchmarks", "commit": "a", "device": "one"}
        return Results(facts, {"Steps": {"columns": ["network", column], "rows": list(rows)}})

    path = tmp_path / "found.json"
    results(["small", "1"], ["small", "2"]).write(path)
    results(["large", "3"]).on_top_of(read_results(path), ["steps"]).write(path)
    results(["small", "4"]).on_top_of(read_results(path), ["steps"]).write(path)
    assert read_results(path).tables["Steps"]["rows"] == [*kept, ["large", "3"], ["small", "4"]]


def test_ratios_are_taken_turn_by_turn() -> None:
    """A machine that grows ten times slower in the middle changes no ratio."""
    times = Times({"a": [1, 10, 100, 1], "b": [2, 20, 200, 2]}, {"a": [1] * 4, "b": [4] * 4})
    assert times.ratio("b", "a") == Spread(2, 2, 2)
    assert times.ratio("b", "a", "cpu") == Spread(4, 4, 4)
    assert times.seconds("a").median == 5.5


def test_turns_time_each_candidate_once_a_round() -> None:
    calls: list[str] = []
    candidates = {"slow": lambda: (calls.append("slow"), time.sleep(0.2)), "quick": lambda: calls.append("quick")}
    times = take_turns(candidates, rounds=3, burn_in=1)
    assert calls == ["slow", "quick", "slow", "quick", "quick", "slow", "slow", "quick"]
    assert times.seconds("slow").low >= 0.2 > times.seconds("quick").high


def test_short_runs_take_more_rounds() -> None:
    times = take_turns({"run": lambda: time.sleep(0.01)}, rounds=1, least_seconds=0.1)
    assert 2 <= len(times.wall["run"]) <= 11


def test_peak_memory_sees_what_is_gone_again() -> None:
    with peak_memory() as memory:
        block = bytearray(b"x") * (64 * 2**20)
        time.sleep(0.05)
        del block
    assert 60 * 2**20 < memory[0] < 128 * 2**20


def test_a_lone_node_reduces_within_itself_and_larger_ones_lose_more() -> None:
    cluster = Cluster(gpus_per_node=8, node_bandwidth=100.0, network_bandwidth=10.0, latency=0.0, jitter=0.0)
    assert cluster.all_reduce_seconds(800, 8, 1) == pytest.approx(2 * 7 / 8 * 8)
    assert cluster.all_reduce_seconds(800, 16, 1) == pytest.approx(14 + 2 * 1 / 2 * 100 / 10)
    shares = [efficiency(100.0, 10.0, 800, 4, count, cluster) for count in (1, 8, 16, 64)]
    assert shares[0] == 1
    assert shares[1] == pytest.approx(100 / (100 + 4))
    assert shares == sorted(shares, reverse=True)


def generator() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "make_performance.py"))


@pytest.mark.parametrize("page", ["performance.md", "scaling.md"])
def test_the_documents_hold_the_measured_tables(page: str) -> None:
    make = generator()
    text = (ROOT / "docs" / page).read_text()
    assert text == make["filled"](text, make["load"]()), "run: python docs/make_performance.py"
    assert "<!-- " in text


def test_a_block_takes_the_table_of_its_name() -> None:
    results = Results({"x": 1}, {"Mining": {"columns": ["ms"], "rows": [["12"]]}})
    page = "a\n<!-- cpu: Mining -->\nold\n<!-- end -->\n<!-- gpu: Epochs -->\n<!-- end -->\nz"
    found = generator()["filled"](page, {"cpu": json.loads(json.dumps(results.__dict__))})
    assert "| ms |\n| --- |\n| 12 |" in found
    assert "old" not in found
    assert "*Not measured yet.*" in found
