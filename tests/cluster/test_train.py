"""Training jobs that fail on a real Ray cluster; tests/jobs/test_end_to_end.py has those that end well."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from ray.train import ControllerError, WorkerGroupError

from tests.cluster.conftest import ROOT, Job
from tests.data.conftest import encoded
from tla_service.cluster import train
from tla_service.cluster.mailbox import Mailbox
from tla_service.cluster.placement import Placement
from tla_service.config import RunConfig
from tla_service.errors import UnavailableError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_once_with_the_reason(start_job: Callable[..., Job]) -> None:
    job = start_job("--optimizer.name", "sgd", "--optimizer.learning_rate", "1e25")
    printed = job.wait()
    assert job.process.returncode == 1
    assert "the loss is not finite by step" in printed
    assert "Traceback" not in printed
    assert [record["event"] for record in job.records()].count("start") == 1


ALLOCATING = """
import itertools, os, torch

calls = itertools.count(1)

def term(adversarial, clean, labels):
    if os.environ.get("RANK") == "1" and next(calls) > 1:  # the first is a check
        torch.empty(2**60)
    return adversarial.logits.sum(1)
"""


@pytest.mark.slow
def test_lack_of_memory_on_one_worker_ends_the_run_with_what_to_lower(
    start_job: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "allocating.py").write_text(ALLOCATING)
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    job = start_job("--loss.extra", '{"allocating:term": 1}', "--scaling.num_workers", "2", environment=environment)
    printed = job.wait()
    assert job.process.returncode == 2, printed
    last = printed.splitlines()[-1]
    assert last.startswith("error: training.global_batch_size=50: out of memory (rank 1, ")
    assert "each worker had 25 images, for digits_cnn in float32: lower training.global_batch_size, " in last
    assert [record["event"] for record in job.records()].count("start") == 1
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_that_one_worker_reads_ends_the_run_by_its_name(
    start_job: Callable[..., Job], tmp_path: Path, split: str
) -> None:
    for number in range(40):
        for part in ("train", "val", "test"):
            path = tmp_path / "set" / part / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(np.full((8, 8), 6 * number, np.uint8)))
    damaged = tmp_path / "set" / split / "dog" / "7.png"
    damaged.write_bytes(b"no image")
    data = f"--data.name image_folder --data.root {tmp_path / 'set'} --data.image_size 8 --data.residency stream"
    job = start_job(*data.split(), "--scaling.num_workers", "2")
    printed = job.wait()
    assert job.process.returncode == 3, printed
    assert printed.splitlines()[-1].startswith(f"error: data.root={damaged}: not a readable image (")
    assert [record["event"] for record in job.records()].count("start") == 1
    assert "Traceback" not in printed


def test_the_error_of_a_worker_that_failed_alone_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Mailbox()
    mailbox = SimpleNamespace(
        **{name: SimpleNamespace(remote=getattr(here, name)) for name in ("push", "fetch", "stop")}
    )
    monkeypatch.setattr(train.ray, "get", lambda found: found)
    monkeypatch.setattr(train, "ALONE_SECONDS", 0)
    error, followed = UnavailableError("data.root", "x.png", "damaged", "remove it"), list[Any]()
    train._tell_alone(mailbox, 1, error)
    placement: Any = None
    with pytest.raises(UnavailableError) as caught:
        train._follow(Future(), mailbox, followed.append, 5, placement)
    assert caught.value is error
    assert followed == [{"event": "failure", "message": f"rank 1 failed alone: {error}"}]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray copies it
@pytest.mark.parametrize("dashboard", ["", "127.0.0.1:8265"])
def test_no_process_is_started_for_nothing(monkeypatch: pytest.MonkeyPatch, dashboard: str) -> None:
    """Each would take seconds of every start; without a dashboard, the cleaner could not do its work."""
    monkeypatch.setattr(train, "get_webui_url_from_internal_kv", lambda: dashboard)
    names = {type(each).__name__ for each in train._Trainer(print)._create_default_callbacks()}
    assert "BackendSetupCallback" in names
    assert "DatasetsCallback" not in names
    assert ("PlacementGroupCleanerCallback" in names) == bool(dashboard)


def played(monkeypatch: pytest.MonkeyPatch, *batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run tells whose mailbox has these records, one batch at a time."""
    told: list[dict[str, Any]] = []
    left, future = list(batches), Future[Any]()

    def fetch() -> list[dict[str, Any]]:
        if len(left) == 1:
            future.set_result(None)
        return left.pop(0) if left else []

    monkeypatch.setattr(train.ray, "get", lambda records: records)
    monkeypatch.setattr(train, "FETCH_SECONDS", 0)
    mailbox = SimpleNamespace(fetch=SimpleNamespace(remote=fetch), stop=SimpleNamespace(remote=None))
    train._follow(future, mailbox, told.append, 0, Placement(2, False, 1, 1))
    return told


def test_a_failure_that_ray_repeats_until_the_other_workers_end_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def failure() -> dict[str, Any]:
        return {"event": "failure", "message": "workers failed: {1: 'gone'}", "lacks_memory": None}

    told = played(monkeypatch, [{"event": "placed"}], [failure()], [failure()], [{"event": "placed"}], [failure()], [])
    assert [record["event"] for record in told] == ["placed", "failure", "placed", "failure"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (WorkerGroupError("rank 1\ngone", {}), "training failed more than scaling.max_failures=3 times: gone"),
        (ControllerError(ValueError("no such thing")), "Ray Train failed: no such thing"),
    ],
)
def test_what_ray_train_does_not_retry_is_not_told_as_too_many_failures(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("start_mailbox", "trainer_of", "own_dashboard"):
        monkeypatch.setattr(train, name, MagicMock())
    monkeypatch.setattr(train.ray, "put", lambda value: value)
    monkeypatch.setattr(train, "_follow", Mock(side_effect=error))
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        train.fit_on_ray(RunConfig(), Placement(2, False, 1, 1), str(tmp_path), print)
