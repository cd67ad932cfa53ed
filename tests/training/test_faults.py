"""Faults of one worker or its data in a real run: what all workers do, and what they say."""

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import free_port
from tests.training.conftest import digits_config
from tla_service.config import RunConfig
from tla_service.errors import OutOfMemoryError
from tla_service.models import ModelOutput
from tla_service.training.checkpoint import verify_checkpoint
from tla_service.training.local import train
from tla_service.training.meter import NonFiniteLossError, memory_remedy

AT_CALL = 11  # after two epochs of four steps, and a call before the first; the fault comes in step 10
calls = itertools.count(1)


def is_time() -> bool:
    return next(calls) >= AT_CALL and os.environ.get("RANK", "1") == "1"


def diverge(adversarial: ModelOutput, clean: ModelOutput, labels: Tensor) -> Tensor:
    return adversarial.logits.sum(1) * (torch.inf if is_time() else 0.0)


def sleep(adversarial: ModelOutput, clean: ModelOutput, labels: Tensor) -> Tensor:
    if is_time():
        time.sleep(600)
    return adversarial.logits.sum(1)


def allocate(adversarial: ModelOutput, clean: ModelOutput, labels: Tensor) -> Tensor:
    if is_time():
        torch.empty(2**60)
    return adversarial.logits.sum(1)


def config_with(term: Callable[..., Tensor], **changes: object) -> RunConfig:
    extra = {f"{__name__}:{term.__name__}": 1.0}
    return digits_config(
        loss={"extra": extra}, evaluation={"every_epochs": 1, "validation": {"num_steps": 2}}, **changes
    )


def work(rank: int, port: int, term: Callable[..., Tensor], folder: Path) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    try:
        train(config_with(term, scaling={"hang_seconds": 5}), folder / "run")
    except NonFiniteLossError as error:
        (folder / f"error-{rank}").write_text(str(error))


def run_two(term: Callable[..., Tensor], folder: Path) -> list[int | None]:
    """Exit codes of two workers; None for one that had to be killed."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=work, args=(rank, port, term, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def test_lack_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.calls", itertools.count(1))
    with pytest.raises(OutOfMemoryError) as caught:
        train(config_with(allocate), tmp_path / "run")
    assert str(caught.value).startswith("training.global_batch_size=50: out of memory (rank 0, ")
    assert "each worker had 50 images, for digits_cnn in float32" in str(caught.value)
    assert "can't allocate memory" in str(caught.value)
    assert (tmp_path / "run" / "checkpoints" / "step-000000008").exists()


@pytest.mark.distributed
def test_all_workers_stop_together_where_one_has_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    assert run_two(diverge, tmp_path) == [0, 0]
    told = "the loss is not finite by step 10; lower optimizer.learning_rate or set optimizer.grad_clip"
    assert [(tmp_path / f"error-{rank}").read_text() for rank in range(2)] == [told] * 2
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert newest.name == "step-000000008"
    verify_checkpoint(newest)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_worker_that_hangs_in_training_ends_the_run_in_one_line(tmp_path: Path) -> None:
    assert run_two(sleep, tmp_path) == [1, 1]
    (line,) = (tmp_path / "stderr-0").read_text().splitlines()
    assert line.startswith("error: rank 1 on ")
    assert " is at test_faults.py:" in line
    assert " in sleep and has held up the others for 5 s; look at that process and its node, or raise scaling." in line


def test_the_remedy_has_the_run_s_numbers() -> None:
    config = digits_config(mining={"pool": "separate", "pool_size": 300, "scope": "global"})
    assert memory_remedy(config, 2) == (
        "each worker had 25 images and a pool of 150, for digits_cnn in float32: lower training.global_batch_size, "
        "mining.pool_size or evaluation.batch_size, run fewer workers per node or GPU (scaling.cpus_per_worker, "
        "scaling.gpus_per_worker), or set training.precision to bfloat16"
    )
