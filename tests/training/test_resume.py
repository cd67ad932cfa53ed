"""A run resumes from the newest checkpoint that is whole, says what is wrong with others, and ends the same."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.training.conftest import KeepingReporter, digits_config, weights_of
from tla_service.config import RunConfig
from tla_service.errors import ConfigError, UnavailableError
from tla_service.runtime import WorkerContext
from tla_service.training.checkpoint import RESUMABLE, LocalCheckpoint, restore
from tla_service.training.fit import Run
from tla_service.training.reporting import LocalReporter

# Steps 4 and 8 of 16 are done: the run was stopped at the end of its second epoch.
OLDER, NEWEST, LAST = "step-000000004", "step-000000008", "step-000000016"
CONFIG = digits_config(training={"ema_decay": 0.9})


def train(output: Path, config: RunConfig = CONFIG, *, epochs: int | None = None, code: bytes | None = None) -> Run:
    """Train to the end, or die after so many epochs."""
    with contextlib.closing(LocalReporter(output)) as reporter:
        run = Run(config, WorkerContext(), reporter, code)
        run.start(None)
        if epochs is None:
            run.train()
        for _ in range(epochs or 0):
            assert run.train_epoch()
            run.finish_epoch()
    return run


def records(output: Path, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (output / "log.jsonl").read_text().splitlines())
    return [record for record in lines if record["event"] == event]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Final weights of the run when nothing happens to it."""
    output = tmp_path_factory.mktemp("undisturbed")
    train(output)
    return weights_of(output / "checkpoints" / LAST)


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("half")
    train(output, epochs=2)
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*")) == [OLDER, NEWEST]
    return output


@pytest.fixture
def output(half_done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half_done, tmp_path / "output"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is corrupted"),
    "a file cut short": (lambda folder: truncate(folder / "optimizer.pt"), "optimizer.pt is corrupted"),
    "an empty file": (lambda folder: empty(folder / "state.json"), "state.json is corrupted"),
    "a missing file": (lambda folder: (folder / "average.safetensors").unlink(), "average.safetensors is missing"),
    "a flipped bit in the manifest": (lambda folder: flip(folder / "manifest.json"), "its checksum differs"),
    "a manifest cut short": (lambda folder: truncate(folder / "manifest.json"), "manifest.json is missing or cannot"),
    "a missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or cannot"),
    "a manifest of something else": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json is"),
    "a manifest of nothing": (lambda folder: (folder / "manifest.json").write_text("{}"), "is missing from manifest"),
    "a file that is a folder": (
        lambda folder: ((folder / "data.json").unlink(), (folder / "data.json").mkdir()),
        "data.json is corrupted (its checksum differs)",
    ),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "manifest.json is missing or cannot"),
    "a missing folder": (shutil.rmtree, "it is missing"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_checkpoint_is_passed_over_with_its_reason(
    output: Path, damage: Callable[[Path], Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = output / "checkpoints" / NEWEST
    damage(newest)
    assert train(output, epochs=0).state.step == 4
    (told,) = records(output, "damaged_checkpoint")
    assert told["message"].startswith(f"checkpoint {newest} cannot be used (")
    assert reason in told["message"]
    assert told["message"].endswith(f"; falling back to {output / 'checkpoints' / OLDER}")
    assert f"warning: {told['message']}\n" in capsys.readouterr().out
    assert [record["resumed_from"] for record in records(output, "start")][1:] == [str(newest.parent / OLDER)]


def test_a_run_that_passed_over_a_damaged_checkpoint_ends_the_same(output: Path, undisturbed: dict[str, bytes]) -> None:
    newest = output / "checkpoints" / NEWEST
    flip(newest / "model.safetensors")
    train(output)
    assert weights_of(output / "checkpoints" / LAST) == undisturbed
    assert sorted(path.name for path in newest.parent.glob("step-*")) == ["step-000000012", LAST]


@pytest.mark.parametrize("nth", range(1, 7))
def test_a_process_killed_while_it_saves_leaves_nothing_that_blocks(
    output: Path, undisturbed: dict[str, bytes], nth: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed at the n-th file that it opens or renames there; temporary files are on another file system."""

    def work() -> None:
        tempfile.tempdir = "/dev/shm"
        seen = itertools.count(1)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "os.rename" or (event == "open" and "w" in str(arguments[1]))
            if writes and str(output / "checkpoints") in str(arguments[0]) and next(seen) == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        train(output, epochs=1)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    train(output)
    assert records(output, "damaged_checkpoint") == []
    assert weights_of(output / "checkpoints" / LAST) == undisturbed


@pytest.mark.parametrize("damaged", [(NEWEST, OLDER), (NEWEST,)], ids=["both", "the only one"])
def test_when_none_is_whole_the_run_ends_with_3_and_everything_stays(output: Path, damaged: tuple[str, ...]) -> None:
    if OLDER not in damaged:
        shutil.rmtree(output / "checkpoints" / OLDER)
    for name in damaged:
        flip(output / "checkpoints" / name / "model.safetensors")
    with pytest.raises(UnavailableError) as caught:
        train(output)
    told = str(caught.value)
    assert caught.value.exit_code == 3
    assert told.startswith(f"checkpoint={output / 'checkpoints' / NEWEST}: model.safetensors is corrupted")
    assert ("none of the older ones can be used either" in told) == (len(damaged) == 2)
    assert told.endswith(f"restore its files, or delete {output / 'checkpoints'} to start over")
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*")) == sorted(damaged)


def test_when_all_are_gone_the_run_ends_with_3_until_their_folder_is_deleted(output: Path) -> None:
    checkpoints = output / "checkpoints"
    for name in (NEWEST, OLDER):
        shutil.rmtree(checkpoints / name)
    with pytest.raises(UnavailableError) as caught:
        train(output)
    remedy = f"restore its files, or delete {checkpoints} to start over"
    assert str(caught.value) == f"checkpoint={checkpoints / NEWEST}: it is missing; {remedy}"
    shutil.rmtree(checkpoints)
    assert train(output, epochs=1).state.step == 4


def test_a_damaged_checkpoint_never_pushes_out_the_good_one(output: Path) -> None:
    """Stopped again before it has made two of its own, the run still has the good one."""
    flip(output / "checkpoints" / NEWEST / "model.safetensors")
    train(output, epochs=1)
    flip(output / "checkpoints" / NEWEST / "model.safetensors")
    assert train(output, epochs=0).state.step == 4


def test_what_a_killed_process_left_half_written_is_removed(output: Path) -> None:
    left = output / "checkpoints" / ".0123.part"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with contextlib.closing(LocalReporter(output)) as reporter:
        reporter.stored()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["latest", OLDER, NEWEST]


def test_another_run_is_refused_rather_than_passed_over(output: Path) -> None:
    other = digits_config(loss={"margin": 0.2}, training={"ema_decay": 0.9})
    with pytest.raises(ConfigError, match="has checkpoints of another configuration"):
        train(output, other)


def test_a_checkpoint_of_an_earlier_version_resumes(output: Path, undisturbed: dict[str, bytes]) -> None:
    """It has another digest of the same settings, and one fingerprint of all images."""
    for folder in (output / "checkpoints").glob("step-*"):
        state, data = (json.loads((folder / name).read_text()) for name in ("state.json", "data.json"))
        state["config_digest"] = "0badcafe"
        del data["training_fingerprint"]
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "data.json").write_text(json.dumps(data))
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in sums.items() if k != "manifest.json"}))
    train(output)
    assert weights_of(output / "checkpoints" / LAST) == undisturbed


class OnRankZero(LocalCheckpoint):
    """A checkpoint that only rank 0 can read."""

    def as_directory(self) -> Any:
        if dist.get_rank() == 1:
            raise FileNotFoundError
        return super().as_directory()


def worker(rank: int, folder: str) -> None:
    """One of two workers; the second cannot read the newest checkpoint."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    context = WorkerContext(rank, 2)
    loaded: list[str] = []

    stored = [OnRankZero(f"{folder}/newest"), LocalCheckpoint(f"{folder}/older")]
    warnings: list[str] = []
    # Rank 1 would see another list: what counts is rank 0's.
    found = restore(
        lambda: stored if rank == 0 else [], lambda path: loaded.append(path.name), context, warnings.append
    )
    torch.save({"found": found, "loaded": loaded, "warnings": warnings}, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_all_workers_resume_from_the_same_checkpoint(tmp_path: Path) -> None:
    for name in ("newest", "older"):
        (tmp_path / name).mkdir()
        for required in RESUMABLE:
            (tmp_path / name / required).write_text("")
        empty_sum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        (tmp_path / name / "manifest.json").write_text(json.dumps(dict.fromkeys(RESUMABLE, empty_sum)))
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert [found["loaded"] for found in ranks] == [["older"], ["older"]]
    assert [found["found"] for found in ranks] == [f"{tmp_path}/older"] * 2
    assert ranks[0]["warnings"] == [
        f"checkpoint {tmp_path}/newest cannot be used (it is missing); falling back to {tmp_path}/older"
    ]


def batchnorm_worker(rank: int, folder: str, stop_after: int | None, resume_from: Path | None) -> None:
    """One of two workers, each of which has its own BatchNorm statistics within an epoch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    Path(folder, str(rank)).mkdir()
    reporter = KeepingReporter(Path(folder, str(rank)), stop_after, resume_from)
    training = {"epochs": 2, "global_batch_size": 25, "ema_decay": 0.9, "log_every_steps": 1}
    config = digits_config(data={"train_limit": 100}, model={"name": "mnist_cnn"}, training=training)
    run = Run(config, WorkerContext(rank, 2), reporter)
    run.start(None)
    run.train(measure_test=False)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_workers_stopped_within_an_epoch_keep_their_own_batchnorm_statistics(tmp_path: Path) -> None:
    def run(name: str, stop_after: int | None = None, resume_from: Path | None = None) -> Path:
        (tmp_path / name).mkdir()
        arguments = (str(tmp_path / name), stop_after, resume_from)
        mp.start_processes(batchnorm_worker, args=arguments, nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
        return max((tmp_path / name / "0").glob("step-*"))

    stopped = run("stopped", stop_after=4)
    assert stopped.name == "step-000000006"
    whole, resumed = run("whole"), run("resumed", resume_from=stopped)
    assert weights_of(resumed) == weights_of(whole)


def test_checkpoints_are_saved_within_an_epoch_once_the_last_is_old(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    config = digits_config(training={"ema_decay": 0.9, "checkpoint_minutes": 1e-9, "log_every_steps": 1})
    with contextlib.closing(LocalReporter(tmp_path)) as reporter:
        run = Run(config, WorkerContext(), reporter)
        run.start(None)
        run.train_epoch()
        run.finish_epoch()
        run.train_epoch()  # and dies
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == [
        "step-000000006",
        "step-000000007",
    ]
    train(tmp_path, config)
    assert weights_of(tmp_path / "checkpoints" / LAST) == undisturbed
    assert [record["metrics"]["step"] for record in records(tmp_path, "epoch")] == [4.0, 8.0, 12.0, 16.0]


def test_a_change_of_the_number_of_workers_is_told_and_saved(output: Path, undisturbed: dict[str, bytes]) -> None:
    """The checkpoint is made one of two workers."""
    newest = output / "checkpoints" / NEWEST
    state = json.loads((newest / "state.json").read_text())
    assert state["workers"] == [[0, 1]]
    (newest / "state.json").write_text(json.dumps(state | {"workers": [[0, 2]]}))
    checksums = json.loads((newest / "manifest.json").read_text())
    checksums["state.json"] = hashlib.sha256((newest / "state.json").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(checksums))
    run = train(output)
    told = records(output, "start")[-1]
    assert told["message"] == f"resuming from {newest} on 1 worker (before: 2)"
    assert told["sizes"] == run.state.workers == [[0, 2], [8, 1]]
    assert json.loads((newest.parent / LAST / "state.json").read_text())["workers"] == [[0, 2], [8, 1]]
    assert weights_of(output / "checkpoints" / LAST) == undisturbed


def test_a_run_says_from_where_it_starts(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, digits_config(training={"epochs": 1}))
    first, second = records(tmp_path, "start")
    assert (first["resumed"], first["message"]) == (False, "training on 1 worker")
    assert (second["resumed"], second["message"]) == (
        True,
        f"resuming from {tmp_path}/checkpoints/step-000000004 on 1 worker",
    )


def unlike_worker(rank: int, folder: str) -> None:
    """One of two workers on nodes whose copies of the data differ in one image."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    config = digits_config(data={"train_limit": 200 + rank})
    try:
        Run(config, WorkerContext(rank, 2), KeepingReporter(Path(folder, str(rank)))).start(None)
    except ConfigError as error:
        Path(folder, f"error-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_workers_with_other_data_than_rank_0_are_refused_before_the_first_step(tmp_path: Path) -> None:
    mp.start_processes(unlike_worker, args=(str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    told = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert re.match(
        r"data\.root: its files on \S+ \(rank 1\) differ from those of rank 0; give all nodes the same", told[0]
    )
