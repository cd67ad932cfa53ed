"""Several real gloo processes against one: the same global batch, the same loss, negatives and gradients."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.conftest import free_port
from tests.training.conftest import digits_config, random_batch
from tla_service.data import Batch, StepBatch, load_dataset
from tla_service.data.order import StepOrder, shard_sizes
from tla_service.errors import ConfigError, UnavailableError
from tla_service.job import run_job
from tla_service.models import build_model
from tla_service.runtime import WorkerContext, average_buffers, failing_together, generator
from tla_service.training import step as step_module
from tla_service.training.__main__ import main
from tla_service.training.precheck import training_batches
from tla_service.training.step import TrainingStep

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
# 22 images over 4 workers are 6, 6, 5, 5: shards that differ in size must not change the mean.
WORKERS, IMAGES, POOL = 4, 22, 16
CASES: dict[str, dict[str, Any]] = {
    "at": {"method": "at"},
    "alp": {"method": "alp"},
    "trades": {"method": "trades"},
    "tla on mart with adversarial weights": {
        "mining": {"scope": "global"},
        "loss": {"robust_term": "mart", "margin": 0.5},
        "attack": {"awp": True, "awp_gamma": 0.1},
    },
    "class weights": {"method": "trades", "data": {"balance": "class_weights"}},
    "tla on trades with a second view and adversarial weights": {
        "mining": {"scope": "global"},
        "data": {"augment": "autoaugment"},
        "training": {"batchnorm_roles": "apart"},
        "loss": {"robust_term": "trades", "margin": 0.5, "view_weight": 0.4},
        "attack": {"awp": True, "awp_gamma": 0.1},
    },
    "n_fgsm": {"method": "at", "attack": {"kind": "n_fgsm", "noise": 0.0}},
    "free": {"mining": {"scope": "global"}, "loss": {"margin": 0.5}, "attack": {"kind": "free", "free_replays": 3}},
    "tla in the batch": {"mining": {"scope": "global", "positives": "both"}, "loss": {"margin": 0.5}},
    "tla in the batch, summed": {"mining": {"scope": "global"}, "loss": {"margin": 0.5, "reduction": "sum"}},
    "tla in the batch with extra images": {  # over 4 workers 5, 6, 6, 5
        "mining": {"scope": "global", "positives": "both"},
        "data": {"extra": {"path": "unused", "share": 0.5}},
        "training": {"global_batch_size": IMAGES},
        "loss": {"margin": 0.5},
    },
    "switched anchor": {"method": "tla_sa", "mining": {"scope": "global"}, "loss": {"margin": 0.5}},
    "separate pool": {
        "mining": {"scope": "global", "pool": "separate", "pool_size": POOL, "positives": "both"},
        "loss": {"margin": 0.5, "norm_form": "mean_squares"},
    },
}


def fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise UnavailableError("data.root", "/x", "missing", "give it")


def shard(batch: Batch, context: WorkerContext, extra: int = 0) -> Batch:
    sizes = shard_sizes(len(batch.labels), context.world_size, extra)
    return Batch(batch.images.split(sizes)[context.rank], batch.labels.split(sizes)[context.rank])


def run_case(changes: dict[str, Any], context: WorkerContext) -> dict[str, torch.Tensor]:
    """One step on this worker's share: sums, pool rows mined each time (times, N), gradients."""
    # Each worker draws for its own images: what several workers share with one is what is made without a draw.
    attack = {"objective": "cross_entropy"} | changes.get("attack", {})
    if "kind" not in attack:  # the others always start at noise
        attack["random_start"] = False
    config = digits_config(**changes | {"attack": attack})
    torch.manual_seed(3)
    network = build_model("digits_cnn", 4, (1, 8, 8)).double()
    whole = random_batch(IMAGES, pool=POOL)
    assert whole.positives is not None
    assert whole.pool is not None
    parts = [shard(part, context, config.extra_per_step) for part in (whole.anchors, whole.positives)]
    parts.append(shard(whole.pool, context))
    mined: list[torch.Tensor] = []
    original, noise = step_module.mine_hardest, step_module.uniform_noise

    def remember(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        mined.append(found.indices)
        return found

    step_module.mine_hardest = remember
    step_module.uniform_noise = lambda images, _radius, _random: torch.zeros_like(images)
    step = TrainingStep(network, config, context)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    try:
        is_weighted = config.data.balance == "class_weights"
        weights = torch.tensor([0.5, 2.0, 1.0, 3.0])[parts[0].labels] if is_weighted else None
        view = parts[1] if config.loss.view_weight else None
        for sums in step.updates(StepBatch(*parts, IMAGES, weights, view), 0):
            totals = sums
            if config.attack.kind == "free":  # the weights move between its updates
                optimizer.step()
    finally:
        step_module.mine_hardest, step_module.uniform_noise = original, noise
    gradients = {f"gradient {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {"totals": totals, "mined": torch.stack(mined) if mined else torch.zeros(1, 0), **gradients}  # type: ignore[dict-item]


def worker(rank: int, world_size: int, folder: str) -> None:
    """One process: every case, then what else needs several; results go to a file."""
    warnings.simplefilter("ignore", FutureWarning)  # torch's own `all_gather`
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    context = WorkerContext(rank, world_size, CPU)
    results: dict[str, Any] = {name: run_case(changes, context) for name, changes in CASES.items()}
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(float(rank))  # type: ignore[union-attr]
    norm.register_buffer("constant", torch.tensor(float(rank)), persistent=False)
    average_buffers(norm, context)
    results["buffers"], results["constant"] = norm.running_mean, norm.constant
    try:
        with failing_together(context):
            fail_on_rank_1(rank)
    except UnavailableError as error:
        results["error"] = str(error)
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("world")
    run_case({}, WorkerContext())  # imports what each worker would otherwise import
    mp.start_processes(worker, args=(WORKERS, str(folder)), nprocs=WORKERS, start_method="fork")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(WORKERS)]


@pytest.mark.parametrize("name", CASES)
def test_workers_together_equal_one_process(gathered: list[dict[str, Any]], name: str) -> None:
    alone = run_case(CASES[name], WorkerContext())
    together = [results[name] for results in gathered]
    totals = torch.stack([part["totals"] for part in together]).sum(0)
    torch.testing.assert_close(totals, alone["totals"], rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.cat([part["mined"] for part in together], 1), alone["mined"])
    for gradient in (key for key in alone if key.startswith("gradient")):
        for part in together:
            torch.testing.assert_close(part[gradient], alone[gradient], rtol=1e-10, atol=1e-10)


def test_buffers_become_the_mean_over_workers(gathered: list[dict[str, Any]]) -> None:
    mean = (len(gathered) - 1) / 2
    assert all(results["buffers"].tolist() == [mean, mean] for results in gathered)
    assert [results["constant"].item() for results in gathered] == [*range(len(gathered))]


def test_one_workers_error_ends_all(gathered: list[dict[str, Any]]) -> None:
    assert {results["error"] for results in gathered} == {"data.root=/x: missing; give it"}


@pytest.mark.parametrize("extra", [0, 3, 75])
@pytest.mark.parametrize("world_size", range(1, 6))
def test_shard_sizes_are_what_the_order_of_steps_gives_each_worker(world_size: int, extra: int) -> None:
    """Steps of 25 and 24 training images, and extra ones."""
    labels, sizes = torch.zeros(97, dtype=torch.int64), {"global_batch_size": 25, "extra_per_step": extra}
    ranks = [StepOrder(labels, seed=0, rank=r, world_size=world_size, extra=90, **sizes) for r in range(world_size)]
    for step in zip(*(rank.epoch(0) for rank in ranks), strict=True):
        assert shard_sizes(step[0].global_size, world_size, extra) == [len(share.anchors) for share in step]


def command_line(rank: int, port: int, arguments: list[str], folder: Path) -> None:
    """`python -m tla_service.training` in one of three processes, as torchrun starts them."""
    environment = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    with (folder / f"stderr-{rank}").open("w") as sys.stderr:
        sys.argv = ["training", *arguments]
        code = run_job(main)
    os._exit(code)


def test_a_pool_that_cannot_be_shared_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pool = "--preset digits --mining.scope global --mining.pool separate --mining.pool_size 500"
    arguments, port, fork = [*pool.split(), "--output", str(tmp_path / "run")], free_port(), mp.get_context("fork")
    processes = [fork.Process(target=command_line, args=(rank, port, arguments, tmp_path)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    refused = "error: mining.pool_size=500: not divisible by 3 workers with mining.scope=global; use 498 or 501\n"
    for rank, process in enumerate(processes):
        assert (process.exitcode, (tmp_path / f"stderr-{rank}").read_text()) == (2, refused)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_pools_are_the_whole_pool(workers: int) -> None:
    """What `mining.pool_size` says is what is mined from, however many workers share it."""
    config = digits_config(mining={"scope": "global", "pool": "separate", "pool_size": 30})
    dataset = load_dataset(config.data)
    rows = torch.arange(len(dataset.train))
    shares = [training_batches(config, dataset.train, rows, WorkerContext(rank, workers)) for rank in range(workers)]
    pools = [next(share.epoch(0)).pool for share in shares]
    assert sum(len(pool.labels) for pool in pools if pool is not None) == 30
    with pytest.raises(ConfigError, match=r"mining\.pool_size=30: not divisible by 4 workers"):
        training_batches(config, dataset.train, rows, WorkerContext(world_size=4))


def test_generators_depend_on_every_part() -> None:
    draws = {float(torch.rand((), generator=generator(CPU, *parts))) for parts in ((0, 1), (1, 0), (0, 0), (0, 1, 0))}
    assert len(draws) == 4
