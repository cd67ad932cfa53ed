"""Many promotions at once on a real server, and one that is killed while it holds the lock.

`pytest -m chaos tests/registry/test_promotion_races.py`
"""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.registry.evaluations import evaluate, fates, register_another
from tests.registry.tracking_server import Packaged, TrackingServer
from tla_service.config import TrackingConfig
from tla_service.registry.job_settings import GateRules
from tla_service.registry.lock import registry_lock
from tla_service.registry.promotion import Promotion
from tla_service.tracking.connection import client

pytestmark = [pytest.mark.chaos, pytest.mark.distributed, pytest.mark.timeout(1800)]
PROCESSES, THREADS = 4, 50
RULES = GateRules(min_detection_auc=0.7)


@pytest.fixture
def own_server(tmp_path: Path) -> TrackingServer:
    server = TrackingServer(tmp_path)
    server.start()
    yield server
    server.kill()


def _is_finished(run: Run) -> bool:
    return bool(run.info.status == "FINISHED")


def promote_many(uri: str, versions: list[str], begin: float, results: "multiprocessing.Queue[str]") -> None:
    """One process's promotions, all at once, each as a command of its own would make it."""

    def one(version: str) -> str:
        time.sleep(max(0.0, begin - time.time()))
        try:
            return Promotion(TrackingConfig(uri=uri), "tla-digits", "champion", RULES).promote(version).verdict
        except Exception as error:  # noqa: BLE001 - or the test would wait for a verdict that never comes
            return f"failed: {error}"

    with ThreadPoolExecutor(len(versions)) as pool:
        for version, verdict in zip(versions, pool.map(one, versions), strict=True):
            results.put(f"{version} {verdict}")


def test_200_promotions_of_two_candidates_leave_the_better_one(own_server: TrackingServer, tmp_path: Path) -> None:
    packaged = Packaged(own_server.uri)
    better = register_another(packaged)
    evaluate(packaged, "1", fates(clean=390, autoattack=280))
    evaluate(packaged, better, fates(clean=390, autoattack=300))
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    begin = time.time() + 30  # by then all processes have imported everything
    work = [["1", better] * (THREADS // 2) for _ in range(PROCESSES)]
    processes = [context.Process(target=promote_many, args=(own_server.uri, part, begin, results)) for part in work]
    for process in processes:
        process.start()
    verdicts = Counter(results.get(timeout=1500) for _ in range(PROCESSES * THREADS))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (tmp_path / "verdicts.txt").write_text(f"{dict(verdicts)} in {time.time() - begin:.0f} s")
    made = MlflowClient(own_server.uri)
    aliases = {name: str(at) for name, at in made.get_registered_model("tla-digits").aliases.items()}
    assert aliases["champion"] == better
    assert sum(verdicts.values()) == PROCESSES * THREADS
    experiment = made.get_experiment_by_name("tla-promotions").experiment_id
    # A create whose answer was lost, and that the server carried out late, may be there twice, under one id.
    found = made.search_runs([experiment], max_results=1000)
    runs = list({run.data.tags["tla.promotion.id"]: run for run in sorted(found, key=_is_finished)}.values())
    recorded = Counter(f"{run.data.tags['tla.promotion.version']} {run.data.tags['tla.promotion']}" for run in runs)
    assert recorded == verdicts
    assert {run.info.status for run in runs} == {"FINISHED"}
    changes = sorted(
        (int(tags["tla.promotion.sequence"]), tags["tla.promotion.replaced"], tags["tla.promotion.version"])
        for tags in (run.data.tags for run in runs)
        if tags["tla.promotion"] == "promoted"
    )
    # Each change begins where the one before ended, and the last is to the better version.
    assert [replaced for _, replaced, _ in changes] == ["", *(version for _, _, version in changes[:-1])]
    assert changes[-1][2] == better
    assert len(changes) <= 2
    findings = [json.loads(run.data.tags["tla.promotion.findings"]) for run in runs]
    assert all(finding[0]["rule"] == "version intact" for finding in findings)


def hold_and_hang(uri: str, ready: "multiprocessing.Queue[int]") -> None:
    with registry_lock(client(uri), "tla-digits-champion"):
        ready.put(os.getpid())
        time.sleep(600)


def test_a_promotion_that_is_killed_does_not_stop_the_next(
    own_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = Packaged(own_server.uri)
    evaluate(packaged, "1", fates(clean=390, autoattack=300))
    context = multiprocessing.get_context("spawn")
    ready: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=hold_and_hang, args=(own_server.uri, ready))
    process.start()
    os.kill(ready.get(timeout=120), signal.SIGKILL)
    process.join()
    began = time.monotonic()
    decision = Promotion(TrackingConfig(uri=own_server.uri), "tla-digits", "champion", RULES).promote("1")
    assert decision.verdict == "promoted"
    assert 80 < time.monotonic() - began < 300
