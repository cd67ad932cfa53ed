"""Health checks: how each judges what nodes report, and all of them on a local cluster."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray

from tests.cluster.conftest import ROOT
from tla_service.cluster import storage
from tla_service.cluster.doctor import examine as checks
from tla_service.cluster.doctor import node
from tla_service.cluster.doctor.examine import GIB, Finding, Node, table, verdict
from tla_service.cluster.doctor.settings import CheckupSettings
from tla_service.cluster.placement import Placement
from tla_service.config import ScalingConfig, TrackingConfig
from tla_service.errors import UnavailableError

HERE = Node("id", "10.0.0.1", gpus=2)
SETTINGS = CheckupSettings(_cli_parse_args=[])  # type: ignore[call-arg]


def test_a_node_with_another_version_fails_and_is_named() -> None:
    own = node.facts(None, "/nowhere/yet")["versions"]
    assert checks.versions(HERE, own).state == "ok"
    finding = checks.versions(HERE, own | {"ray": "2.1.0", "driver": "999"})
    assert (finding.state, finding.where) == ("FAIL", "10.0.0.1")
    assert finding.detail.startswith("ray 2.1.0, driver has ")


@pytest.mark.parametrize(
    ("free", "refused", "state"),
    [(8 * GIB, "", "ok"), (GIB // 2, "", "warn"), (GIB, "No space left on device", "FAIL")],
)
def test_shared_memory(free: int, refused: str, state: str) -> None:
    told = {"shared_memory": free, "shared_memory_error": refused}
    assert checks.shared_memory(HERE, told, SETTINGS).state == state


def test_a_full_cache_disk_is_a_warning() -> None:
    assert checks.cache(HERE, GIB, "/cache").state == "warn"
    assert checks.cache(HERE, 100 * GIB, "/cache").state == "ok"


@pytest.mark.parametrize(("apart", "state"), [(0.1, "ok"), (-1.9, "ok"), (30.0, "warn"), (-4000.0, "FAIL")])
def test_clocks(apart: float, state: str) -> None:
    assert checks.clock(HERE, apart).state == state


def test_a_clock_that_does_not_answer_is_not_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {node.facts: {}, time.time: "no response within 120 s", node.use_shared_memory: ""}
    monkeypatch.setattr(checks, "_on_node", lambda _node, call, *_: answers[call])
    told: Any = checks._facts(HERE, SETTINGS)
    finding = checks.clock(HERE, told["clock_seconds"])
    assert (finding.state, finding.detail) == ("FAIL", "no response within 120 s")


def test_an_error_of_the_workers_without_a_text_is_named_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 99.0}}])
    monkeypatch.setattr(node, "use_workers", Mock(side_effect=AssertionError()))
    finding = checks.workers(SETTINGS.model_copy(update={"workers": 2}))
    assert (finding.state, finding.detail) == ("FAIL", "AssertionError")


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ([("H200", 700.0), ("H200", 690.0)], "ok"),
        ([("H200", 700.0)], "FAIL"),
        ("no response within 120 s", "FAIL"),
    ],
)
def test_gpus(told: Any, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_on_node", lambda *_, **__: told)
    assert checks.gpus(HERE, SETTINGS).state == state
    assert checks.gpus(Node("id", "a", gpus=0), SETTINGS).state == "note"


def test_storage_is_tried_by_writing_and_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_on_node", lambda _node, call, _seconds, *arguments: call(*arguments))
    settings = SETTINGS.model_copy(update={"scaling": ScalingConfig(storage=str(tmp_path / "runs")), "megabytes": 1})
    finding = checks.storage(HERE, settings)
    assert finding.state in ("ok", "warn")
    assert "MB/s written" in finding.detail
    assert list((tmp_path / "runs").iterdir()) == []


def test_storage_that_refuses_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    settings = SETTINGS.model_copy(update={"scaling": ScalingConfig(storage=str(tmp_path / "file" / "runs"))})
    finding = checks.storage(HERE, settings)
    assert (finding.where, finding.state) == ("driver", "FAIL")
    assert finding.detail.startswith("cannot be read or written")


def test_storage_that_is_each_nodes_own_folder_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(_node: Node, call: Any, _seconds: float, uri: str, *arguments: Any) -> Any:
        try:
            return call(f"{uri}/of-another-node", *arguments)
        except UnavailableError as error:
            return error.reason

    monkeypatch.setattr(storage, "SHARED_SECONDS", 0.0)
    monkeypatch.setattr(checks, "_on_node", elsewhere)
    settings = SETTINGS.model_copy(update={"scaling": ScalingConfig(storage=str(tmp_path / "runs"))})
    finding = checks.storage(HERE, settings)
    assert finding.state == "FAIL"
    assert finding.detail.endswith("does not see what the driver wrote there")
    assert "a folder has to be shared by all nodes" in finding.remedy
    assert list((tmp_path / "runs").iterdir()) == []


def test_mlflow_is_written_to_and_left_clean(local_uri: str) -> None:
    from mlflow import MlflowClient

    settings = SETTINGS.model_copy(update={"tracking": TrackingConfig(uri=local_uri)})
    assert checks.tracking(settings).state == "ok"
    experiment = MlflowClient(local_uri).get_experiment_by_name("tla")
    assert MlflowClient(local_uri).search_runs([experiment.experiment_id]) == []


def test_a_password_in_the_servers_address_is_not_shown() -> None:
    settings = SETTINGS.model_copy(update={"tracking": TrackingConfig(uri="http://me:hunter2@127.0.0.1:9")})
    finding = checks.tracking(settings)
    assert finding.state == "FAIL"
    assert "hunter2" not in table([finding])


def test_the_table_shows_remedies_and_the_verdict_counts() -> None:
    findings = [Finding("clock", "10.0.0.1", "ok", "+0.0 s"), Finding("GPUs", "10.0.0.12", "FAIL", "none", "mend it")]
    assert table(findings).splitlines() == [
        "clock  10.0.0.1   ok    +0.0 s",
        "GPUs   10.0.0.12  FAIL  none",
        "                        -> mend it",
    ]
    assert verdict(findings) == "1 checks failed, 0 warnings"
    assert verdict(findings[:1]) == "all checks passed"


def test_shared_memory_is_written() -> None:
    assert node.use_shared_memory(1000) == ""


def test_more_workers_than_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default batch would not divide among them."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 99.0}}])
    finding = checks.workers(SETTINGS.model_copy(update={"workers": 100}))
    assert finding.detail.startswith("scaling.num_workers: cannot be placed: ")


def test_a_busy_cluster_is_waited_for_no_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train would try again and again."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    monkeypatch.setattr(node, "own_dashboard", contextlib.nullcontext)
    monkeypatch.setattr(node, "trainer_of", trainer_of := Mock())
    node.use_workers(Placement(2, False, 1, 1), 10, 3)
    assert trainer_of.call_args.kwargs["failure_config"].controller_failure_limit == 0
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "3"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_doctor_finds_this_machine_well(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TLA_", "RAY_", "MLFLOW_"))}
    arguments = ["--megabytes", "4", "--workers", "2", "--scaling.storage", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "doctor.py"), *arguments],
        cwd=tmp_path,
        env=variables | {"RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checked = {line.split("  ")[0] for line in done.stdout.splitlines() if line[:1].strip()}
    assert checked >= {"MLflow", "nodes", "versions", "shared memory", "clock", "GPUs", "storage", "all-reduce"}
    assert "gloo, 2 workers: 4 MB" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []
