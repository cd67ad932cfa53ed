"""The user's own network on a cluster, killed and resumed, swept, evaluated, promoted and loaded; and one of timm."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from tests.cluster.conftest import ROOT, Job
from tests.cluster.test_chaos import train_workers
from tests.models.test_own_code import OWN
from tla_service.registry.loading import load_model

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(5400)]
SECONDS = 900
RUN = ("--training.epochs", "8", "--attack.num_steps", "10", "--scaling.num_workers", "2")
EVALUATION = shlex.split(
    "--model models:/tla-digits/1 --batch_size 20 --images.attacks 40 --images.autoattack 40 --images.curves 10 "
    "--images.sparse 10 --images.corruptions 10 --images.certified 10 --images.audit 20 --images.unit_tests 12 "
    "--images.transfer 20 --images.representation 40 --images.bank 100 --scaling.num_workers 2"
)
SWEEP = shlex.split(
    "--sweep.num_samples 2 --sweep.name small --sweep.searcher grid --training.epochs 2 --scaling.num_workers 1 "
    """--sweep.space '{"loss.margin": {"values": [0.05, 0.1]}}'"""
)
RULES = shlex.split(
    "--model tla-digits --version 1 --no-rules.audit --rules.min_images 1 --rules.min_autoattack_accuracy 0 "
    "--rules.min_clean_accuracy 0 --rules.min_detection_auc 0"
)


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


@pytest.mark.parametrize("kind", ["own", "timm"])
def test_from_training_to_a_champion(tmp_path: Path, jobs: list[Job], kind: str) -> None:
    code = tmp_path / "code"
    shutil.copytree(OWN, code)
    network = ["--model.name", "network:build", "--model.code", str(code)]
    if kind == "timm":
        pytest.importorskip("timm")
        network = ["--model.name", "timm:resnet10t"]

    def start(folder: str, *arguments: str, **options: object) -> Job:
        (tmp_path / folder).mkdir(exist_ok=True)
        jobs.append(Job(tmp_path / folder, *arguments, **options))  # type: ignore[arg-type]
        return jobs[-1]

    def finish(job: Job) -> str:
        printed = job.wait(SECONDS)
        assert job.process.returncode == 0, printed
        assert "Traceback" not in printed
        return printed

    printed = finish(start("whole", *RUN, *network))
    assert ("embedding: input of head, 32 numbers" if kind == "own" else "embedding: input of fc, 512") in printed
    killed = start("run", *RUN, *network)
    killed.wait_for_epoch(2, SECONDS)
    os.kill(train_workers(killed)[0], signal.SIGKILL)  # a worker, and then everything
    killed.wait_for_epoch(4, SECONDS)
    killed.end()
    if kind == "own":
        network[3] = str(code.rename(tmp_path / "moved"))
    resumed = start("run", *RUN, *network)
    assert "resuming from" in finish(resumed)
    whole, again = (
        load_file(tmp_path / name / "output" / "checkpoint" / "best.safetensors") for name in ("whole", "run")
    )
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())

    if kind == "own":
        shutil.rmtree(tmp_path / "moved")  # the version has all that it needs
    finish(start("run", *EVALUATION, script="evaluate_tla.py", preset=(), output=tmp_path / "report"))
    command = [sys.executable, str(ROOT / "jobs" / "promote_model.py"), *RULES]
    done = subprocess.run(command, cwd=tmp_path / "run", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    uri = f"sqlite:///{tmp_path}/run/mlflow.db"
    assert int(MlflowClient(uri).get_model_version_by_alias("tla-digits", "champion").version) == 1
    loaded = load_model("models:/tla-digits@champion", tracking=uri)
    assert loaded(torch.rand(2, 1, 8, 8)).logits.shape == (2, 10)

    if kind == "own":
        network[3] = str(OWN)
    swept = start("sweep", *SWEEP, *network, script="tune_tla.py")
    finish(swept)
    summary = json.loads((swept.output / "sweep.json").read_text())
    assert summary["trials"].startswith("2 trials: ")
    assert "failed" not in summary["trials"]
    assert summary["winner"]
