"""The README's promises by its own commands, as processes on real Ray clusters, with MLflow in an SQLite file.

They stand here and not with a package, because they go through the jobs' flags and what the jobs leave behind alone.
One trained run, killed and resumed, serves them all.
"""

import csv
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from jobs import train_tla
from tests.cluster.conftest import QUICK, RAY, ROOT, Cluster, Job
from tests.conftest import S3Server, free_port
from tla_service.config.loading import load_config_file
from tla_service.data import load_dataset
from tla_service.evaluation.shards import load_outcome
from tla_service.job import run_job
from tla_service.registry.loading import load_model
from tla_service.report.schema import read_report
from tla_service.training import __main__ as training

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SECONDS = 400  # for a job that takes 20 to 40 on an idle machine
# Long enough to be killed in the middle: five epochs, each with a checkpoint.
RUN = ("--training.epochs", "5", "--attack.num_steps", "60")
EVALUATION = shlex.split(
    "--data.test_limit 40 --batch_size 20 --images.autoattack 8 --images.curves 4 --images.sparse 4 "
    "--images.corruptions 4 --images.certified 4 --images.adaptive 4 --images.audit 0 --images.unit_tests 0 "
    "--images.transfer 20 --images.representation 40 --images.bank 100 --neighbours.k 5 --certificate.samples 100 "
    "--scaling.num_workers 2 "
    """--attacks '{"fgsm": {"kind": "fgsm"}, "pgd10": {"num_steps": 10}}'"""
)
SWEEP = shlex.split(
    "--sweep.num_samples 2 --sweep.name small --sweep.searcher random --no-sweep.own_first --scaling.num_workers 1 "
    """--training.epochs 2 --sweep.space '{"loss.margin": {"low": 0.1, "high": 0.3}}'"""
)


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server) -> Iterator[Cluster]:
    """A cluster that is there already, with the keys of an S3 server: jobs are told of it by RAY_ADDRESS."""
    started = Cluster(**s3_server.environment)
    yield started
    started.end()


@pytest.fixture(scope="module")
def start(
    cluster: Cluster, s3_server: S3Server, template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Job]]:
    """Starts a job on the cluster, in a new folder with an empty store or a given one."""
    jobs: list[Job] = []

    def call(*arguments: str, folder: Path | None = None, joins: bool = True, **options: Any) -> Job:
        environment = s3_server.environment | ({"RAY_ADDRESS": cluster.address} if joins else {})
        if folder is None:
            folder = tmp_path_factory.mktemp("job")
            shutil.copy(template, folder / "mlflow.db")
        jobs.append(Job(folder, *arguments, environment=environment, **options))
        return jobs[-1]

    yield call
    for job in jobs:
        job.end()


@pytest.fixture(scope="module")
def trained(start: Callable[..., Job]) -> Job:
    """A run whose driver was killed, with the Ray session of its own, and that was resumed on the cluster, from S3."""
    storage = ("--scaling.storage", "s3://images/runs")
    first = start(*RUN, *storage, joins=False)
    first.wait_for_epoch(1, SECONDS)
    first.end()  # its workers too: they would finish the run
    assert not (first.output / "summary.json").exists()
    second = start(*RUN, *storage, folder=first.folder)
    second.printed = second.wait(SECONDS)
    assert second.process.returncode == 0, second.printed
    return second


def last_line(printed: str) -> str:
    return printed.strip().splitlines()[-1]


def client(job: Job) -> MlflowClient:
    return MlflowClient(f"sqlite:///{job.folder}/mlflow.db")


def artifacts(job: Job, run_id: str, folder: str | None = None) -> set[str]:
    """Paths of a run's files, as deep as they lie."""
    found: set[str] = set()
    for item in client(job).list_artifacts(run_id, folder):
        found |= artifacts(job, run_id, item.path) if item.is_dir else {item.path}
    return found


def weights_digest(job: Job) -> str:
    return str(client(job).get_model_version("tla-digits", "1").tags["weights_sha256"])


def test_a_job_trains_tests_and_registers(trained: Job) -> None:
    summary = trained.summary()
    assert "Traceback" not in trained.printed
    assert summary["status"] == "finished"
    assert summary["model_uri"] == "models:/tla-digits/1"
    assert summary["facts"]["workers"] == "2"
    assert set(summary["robust_accuracy"]) == {"fgsm", "pgd50x3", "worst"}
    assert 0 <= summary["robust_accuracy"]["worst"] <= summary["clean_accuracy"] <= 1
    assert set(summary["wall_seconds"]) >= {"start", "data", "train", "validation", "test", "register"}
    assert all(Path(figure).stat().st_size > 10_000 for figure in summary["figures"])
    assert load_config_file(trained.output / "config.yaml").training.epochs == 5
    command = last_line(trained.printed)
    assert command.startswith("next: ")
    assert command.endswith("evaluate_tla.py --model models:/tla-digits/1")

    run = client(trained).get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["loss.margin"] == "0.05"
    # In order of epochs: what the killed driver had not sent is sent at the end.
    epochs = sorted(metric.step for metric in client(trained).get_metric_history(run.info.run_id, "train/loss"))
    assert epochs == list(range(5))
    assert run.data.metrics["test/clean_accuracy"] == summary["clean_accuracy"]
    files = artifacts(trained, run.info.run_id)
    assert {"config.yaml", "log.jsonl", "figures/training_curves.png", "figures/attack.png"} <= files
    assert any(name.startswith("checkpoint/") for name in files)


def test_more_workers_than_the_cluster_has_are_refused_with_the_arithmetic(
    cluster: Cluster, template: Path, tmp_path: Path
) -> None:
    """In a forked process, which need not import everything again."""

    def work() -> None:
        os.chdir(tmp_path)
        os.environ.update(RAY | {"RAY_ADDRESS": cluster.address})
        refused = shlex.split("--output out --scaling.num_workers 3 --scaling.use_gpu true")
        sys.argv = ["train_tla.py", *QUICK, *refused]
        with Path("told").open("w") as sys.stderr:
            code = run_job(train_tla.main)
        os._exit(code)

    shutil.copy(template, tmp_path / "mlflow.db")
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(SECONDS)
    process.kill()
    told = (tmp_path / "told").read_text()
    assert (process.exitcode, told.count("\n")) == (3, 1), told
    assert told.startswith("error: scaling.num_workers=3: cannot be placed: a worker needs 1 CPU and 1 GPU on one node")


def test_the_registered_model_predicts_and_has_gradients(trained: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    summary = trained.summary()
    images = torch.rand(5, 1, 8, 8, requires_grad=True)
    network = load_model(summary["model_uri"], tracking=summary["tracking_uri"])
    output = network(images)
    output.logits.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert output.embeddings.shape == (5, 128)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", summary["tracking_uri"])
    served = mlflow.pyfunc.load_model(summary["model_uri"]).predict(images.detach().numpy())
    np.testing.assert_allclose(served["probabilities"], output.logits.softmax(1).detach().numpy(), atol=1e-6)


def test_a_finished_run_is_not_repeated(
    trained: Job, s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.chdir(trained.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = trained.summary()
    monkeypatch.setattr(sys, "argv", [str(ROOT / "jobs" / "train_tla.py"), *trained.arguments])
    assert run_job(train_tla.main) == 0
    printed = capsys.readouterr().out
    assert "finished before" in printed
    assert last_line(printed) == last_line(trained.printed)
    assert trained.summary() == before


def torchrun(arguments: list[str], folder: Path) -> str:
    """What two processes of it print."""
    launch = f"-m torch.distributed.run --nproc-per-node 2 --master-port {free_port()} -m tla_service.training"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch.split(), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def forked(arguments: list[str], folder: Path) -> str:
    """The same of two processes that are started as torchrun does, and need not import everything again."""
    port = free_port()

    def work(rank: int) -> None:
        environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in environment.items()})
        sys.argv = ["training", *arguments]
        with (folder / f"told-{rank}").open("w") as sys.stdout:
            sys.stderr = sys.stdout
            code = run_job(training.main)
        os._exit(code)

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
    told = "".join((folder / f"told-{rank}").read_text() for rank in range(2))
    assert [process.exitcode for process in processes] == [0, 0], told
    return told


@pytest.mark.parametrize("launch", [forked, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    trained: Job,
    launch: Callable[[list[str], Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The undisturbed one trains without Ray, in two processes."""
    starts = [record for record in trained.records() if record["event"] == "start"]
    assert [record["resumed"] for record in starts] == [False, True]
    arguments = [*QUICK, *RUN, "--output", str(tmp_path / "run")]
    assert "clean accuracy" in launch(arguments, tmp_path)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-000000016", "step-000000020"]
    expected = load_file(tmp_path / "run" / "checkpoints" / kept[-1] / "best.safetensors")
    found = load_model(trained.summary()["model_uri"], tracking=trained.summary()["tracking_uri"]).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: trained.summary()[name] for name in ("clean_accuracy", "robust_accuracy")} == {
        name: summary[name] for name in ("clean_accuracy", "robust_accuracy")
    }

    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    assert run_job(training.main) == 0
    printed = capsys.readouterr().out
    assert "clean accuracy" in printed
    assert "epoch" not in printed


def test_an_evaluation_writes_and_logs_a_report(trained: Job, start: Callable[..., Job]) -> None:
    uri, output = trained.summary()["model_uri"], trained.folder / "report"
    arguments = ("--model", uri, *EVALUATION)
    job = start(*arguments, folder=trained.folder, script="evaluate_tla.py", preset=(), output=output)
    printed = job.wait(SECONDS)
    assert job.process.returncode == 0, printed
    assert "Traceback" not in printed

    report = read_report(output / "report.json")
    assert report.model.weights_sha256 == weights_digest(trained)
    assert (output / "report.html").stat().st_size > 100_000
    assert len(list((output / "figures").glob("*.png"))) > 3
    # Which images the model gets right without an attack, by the registered model itself.
    outcome = load_outcome(output / "outcome.npz")
    config = load_config_file(trained.output / "config.yaml")
    images = load_dataset(config.data).test.fetch(torch.from_numpy(outcome.indices)).float() / 255
    with torch.inference_mode():
        predicted = load_model(uri, tracking=trained.summary()["tracking_uri"])(images).logits.argmax(1).numpy()
    right = predicted == outcome.labels
    assert (outcome.standing("clean") == right).all()
    for attack in ("fgsm", "pgd10"):
        assert not outcome.standing(attack)[~right].any()
    logged = artifacts(trained, trained.summary()["run_id"])
    for file in ("report.html", "images.parquet"):
        assert any(name.endswith(file) for name in logged)


def test_a_sweep_finds_a_winner(start: Callable[..., Job]) -> None:
    job = start(*SWEEP, script="tune_tla.py")
    printed = job.wait(SECONDS)
    assert job.process.returncode == 0, printed
    assert "Traceback" not in printed

    rows = list(csv.DictReader((job.output / "trials.csv").read_text().splitlines()))
    assert len(rows) == 2
    assert {row["status"] for row in rows} <= {"finished", "stopped"}
    assert len({row["loss.margin"] for row in rows}) == 2
    robust = next(name for name in rows[0] if name.endswith("robust_accuracy"))
    best = max(rows, key=lambda row: float(row[robust]))
    winner = load_config_file(job.output / "best.yaml")
    assert float(best[robust]) == max(float(r[robust]) for r in rows if float(r["loss.margin"]) == winner.loss.margin)
    assert winner.training.epochs == 2
    assert json.loads((job.output / "sweep.json").read_text())["winner"]["loss.margin"] == winner.loss.margin
    assert list((job.output / "figures").glob("*.png"))
    command = last_line(printed)
    assert command.startswith("next: ")
    assert command.endswith(f"train_tla.py --config {job.output / 'best.yaml'}")

    experiment = client(job).get_experiment_by_name("tla")
    assert experiment is not None
    runs = client(job).search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2
    assert {run.info.status for run in runs} == {"FINISHED"}
