"""Every stage, for real, on a network that takes milliseconds."""

import contextlib
import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import parts, peers, stages, switches, workers
from benchmarks import run as run_module
from benchmarks.floor import Floor
from benchmarks.gpu import check_numerics
from benchmarks.results import Results, keep_ratios, read_results
from benchmarks.run import run_benchmark
from benchmarks.settings import BenchmarkSettings
from benchmarks.workloads import CPU_WORKLOADS, FullStep, Workload
from tla_service.config.loading import read_settings
from tla_service.errors import ConfigError, UnavailableError
from tla_service.runtime import WorkerContext

TINY = replace(CPU_WORKLOADS["small_cnn"], image_shape=(1, 8, 8), batch_size=8)
WORK = {"small_cnn": TINY}
ALONE = WorkerContext()


@pytest.fixture(autouse=True)
def one_thread_and_no_more_rounds_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(stages.LEAST_SECONDS, "cpu", 0.0)


def quick(*arguments: str) -> BenchmarkSettings:
    return read_settings(BenchmarkSettings, ["--rounds", "2", *arguments])


@pytest.mark.slow  # imports all of the other libraries
@pytest.mark.filterwarnings("ignore")  # which warn of what they use
def test_steps_and_attacks_are_measured_beside_other_libraries() -> None:
    results = Results()
    stages.measure_steps(WORK, quick(), results, {})
    stages.measure_attacks(WORK, quick(), results)
    names = {row[1] for row in results.tables["Steps"]["rows"]}
    assert {
        "AT",
        "TLA, pool: batch",
        *stages.LITERAL,
        *stages.METHODS,
        "floor of AT",
        "floor of TLA",
        "backward() loop",
    } <= names
    assert results.ratios["cpu small_cnn: TLA over AT"]["bar"] == 1.2
    assert results.ratios["cpu small_cnn: literal TLA over AT"]["bar"] == 1.5
    assert results.ratios["cpu small_cnn: literal TLA with two positives over AT"]["bar"] is None
    assert all(spread["median"] > 0 for spread in results.ratios.values())  # type: ignore[operator]
    assert results.tables["Attacks"]["rows"][0][1] == "ours"


@pytest.mark.slow
def test_parts_are_measured() -> None:
    results = Results()
    parts.measure_parts(WORK, quick(), results)
    rows = [row[1] for row in results.tables["Parts"]["rows"]]
    assert rows[:2] == ["read and augment", "attack"]
    shares = [float(row[3].rstrip(" %")) for row in results.tables["Parts"]["rows"] if "alone" not in row[1]]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_a_step_is_freed_without_the_garbage_collector() -> None:
    """It holds CUDA graphs of gigabytes."""
    gc.disable()
    try:
        step = FullStep(TINY, ALONE)
        step()
        gone = weakref.ref(step)
        del step
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_stage_that_takes_too_long_is_killed_and_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    settings = quick("--workloads", '["small_cnn"]', "--output", str(path))
    assert not run_module._measure_elsewhere(settings, "mining", 0.1)
    assert not path.exists()
    assert run_module._measure_elsewhere(settings, "mining", 100)
    assert set(read_results(path).tables) == {"Mining"}


@pytest.mark.slow
def test_a_switch_is_measured_against_the_step_without_it() -> None:
    results = Results()
    chosen = [switch for switch in switches.CPU_SWITCHES if switch[0].startswith(("speed", "mining"))]
    switches.measure_switches(WORK, quick(), results, chosen)
    assert [row[1].strip("`") for row in results.tables["Switches"]["rows"]] == [name for name, _, _ in chosen]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_workers_send_each_gradient_once_and_nothing_during_the_attack() -> None:
    results = Results()
    workers.measure_scaling({"small_cnn": CPU_WORKLOADS["small_cnn"]}, quick(), results)
    found = results.raw["scaling small_cnn"]
    assert found["attack bytes"] == 0
    network = FullStep(CPU_WORKLOADS["small_cnn"], ALONE).network
    assert found["step bytes"] == sum(parameter.nbytes for parameter in network.parameters())
    (row,) = results.tables["Communication"]["rows"]
    assert len(row) == len(results.tables["Communication"]["columns"])
    assert min(found["reduction"]) > 0


def test_numerics_pass_where_they_can_run_and_catch_a_wrong_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu

    work = {"mnist_cnn": Workload("mnist_cnn", (1, 8, 8), 8, 2, 0.3, 0.1, {})}
    kept = {name: variant for name, variant in gpu._VARIANTS.items() if "compiled" not in name}
    monkeypatch.setattr(gpu, "_VARIANTS", kept)
    check_numerics(work, quick(), Results())
    monkeypatch.setattr(gpu, "_VARIANTS", {"another loss": ({"loss": {"margin": 0.9}}, 1e-4)})
    with pytest.raises(RuntimeError, match="another loss: loss off by"):
        check_numerics(work, quick(), Results())


def test_the_floor_counts_its_arithmetic() -> None:
    forward = 2 * 8 * (4 * 4 * 16 * 16 + 2 * 2 * 32 * 16 * 16 + 128 * 128 + 128 * 10)
    assert Floor(TINY, ALONE).flops() == forward * (2 * 7 + 3)
    assert Floor(TINY, ALONE, with_clean=True).flops() == forward * (2 * 7 + 6)


@contextlib.contextmanager
def here(kind: Any, workload: Workload, context: WorkerContext) -> Iterator[dict[str, Any]]:
    """What there is to compare with where no other library is installed, without a process of its own."""
    yield dict(peers._built(kind, workload, context, []))


def test_the_job_writes_results_and_says_what_worsened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "CPU_WORKLOADS", WORK)
    monkeypatch.setattr(run_module, "CPU_STAGES", ("attacks",))
    monkeypatch.setattr(stages, "peers", here)
    arguments = ["--output", str(tmp_path / "found.json"), "--ratios", str(tmp_path / "ratios.json")]
    Results({"commit": "old"}, {"Evaluation": {"columns": [], "rows": []}}).write(tmp_path / "found.json")
    assert run_benchmark(quick(*arguments, "--keep_ratios")) == 0
    found = read_results(tmp_path / "found.json")
    assert set(found.tables) == {"Evaluation", "Attacks"}
    assert (found.facts["commit"] != "old", found.facts["again"]) == (True, {})
    ratios = tmp_path / "ratios.json"
    ratios.write_text(json.dumps({name: value / 100 for name, value in json.loads(ratios.read_text()).items()}))
    assert run_benchmark(quick(*arguments)) == 1
    assert "worse: cpu small_cnn: attack over backward() loop" in capsys.readouterr().out


@pytest.mark.parametrize("file", [True, False])
def test_without_time_for_any_stage_no_ratio_is_judged(
    file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(run_module, "_measure_elsewhere", lambda *_: False)
    arguments = ["--output", str(tmp_path / "found.json"), "--ratios", str(tmp_path / "ratios.json")]
    keep_ratios(tmp_path / "ratios.json", {"a": {"median": 1.0}})
    if file:
        Results(ratios={"a": {"median": 2.0, "low": 2.0, "high": 2.0, "bar": 1.0}}).write(tmp_path / "found.json")
    assert run_benchmark(quick("--device", "cuda", *arguments)) == 0


def test_unknown_stages_workloads_and_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="stages=lunch"):
        run_benchmark(quick("--stages", '["lunch"]'))
    with pytest.raises(ConfigError, match="workloads=vgg"):
        run_benchmark(quick("--workloads", '["vgg"]'))
    with pytest.raises(ConfigError, match=r"variants=float8: there is no such variant; choose from .*; default; "):
        run_benchmark(quick("--variants", '["float8"]'))
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="device=cuda"):
            run_benchmark(quick("--device", "cuda"))
