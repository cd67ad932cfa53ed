"""The whole job on a real Ray cluster: from the command to a registered model."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.conftest import Job
from tla_service.config_loading import load_config_file

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

LOAD = """
import sys, numpy, mlflow, torch
from tla_service.registry import load_model
mlflow.set_tracking_uri(sys.argv[1])
images = torch.rand(5, 1, 8, 8, requires_grad=True)
network = load_model(sys.argv[2])
output = network(images)
output.logits.sum().backward()
served = mlflow.pyfunc.load_model(sys.argv[2]).predict(images.detach().numpy())
numpy.testing.assert_allclose(served["probabilities"], output.logits.softmax(1).detach().numpy(), atol=1e-6)
print("gradient", float(images.grad.abs().sum()) > 0, output.embeddings.shape[1])
"""


def test_a_job_trains_evaluates_and_registers_and_is_not_repeated(
    start_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = start_job()
    printed = job.wait()
    assert job.process.returncode == 0, printed
    assert "Traceback" not in printed
    summary = job.summary()
    assert summary["status"] == "finished"
    assert summary["model_uri"] == "models:/tla-digits/1"
    assert summary["facts"]["workers"] == "2"
    assert set(summary["robust_accuracy"]) == {"fgsm", "pgd50x3", "worst"}
    assert 0 <= summary["robust_accuracy"]["worst"] <= summary["clean_accuracy"] <= 1
    assert set(summary["wall_seconds"]) >= {"start", "data", "train", "validation", "test", "register"}
    assert all(Path(figure).stat().st_size > 10_000 for figure in summary["figures"])
    assert summary["model_uri"] in printed
    config = load_config_file(job.output / "config.yaml")
    assert config.training.epochs == 4
    _check_tracked(summary, tmp_path)

    code = [sys.executable, "-c", LOAD, summary["tracking_uri"], summary["model_uri"]]
    loaded = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "gradient True 128" in loaded.stdout, loaded.stderr

    again = start_job()
    printed = again.wait()
    assert again.process.returncode == 0
    assert "finished before" in printed
    assert again.summary() == summary


def _check_tracked(summary: dict[str, str], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["loss.margin"] == "0.05"
    epochs = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert epochs == [0, 1, 2, 3]
    assert run.data.metrics["test/clean_accuracy"] == summary["clean_accuracy"]
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "figures", "log.jsonl", "checkpoint"} <= artifacts
    assert {"figures/training_curves.png", "figures/attack.png"} <= {
        item.path for item in client.list_artifacts(run.info.run_id, "figures")
    }


def test_more_workers_than_the_cluster_has_is_refused_with_the_arithmetic(start_job: Callable[..., Job]) -> None:
    job = start_job("--scaling.num_workers", "3", "--scaling.use_gpu", "true")
    printed = job.wait()
    assert job.process.returncode == 3
    assert "scaling.num_workers=3: needs 3 x 1 = 3 GPUs, the cluster has 0" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_once_with_the_reason(start_job: Callable[..., Job]) -> None:
    job = start_job("--optimizer.name", "sgd", "--optimizer.learning_rate", "1e25")
    printed = job.wait()
    assert job.process.returncode == 1
    assert "the loss is not finite by step" in printed
    assert "Traceback" not in printed
    assert [record["event"] for record in job.records()].count("start") == 1
