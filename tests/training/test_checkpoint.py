"""Checkpoints are whole, verified and free of code."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.training.conftest import digits_config
from tla_service.errors import ConfigError, UnavailableError
from tla_service.runtime import WorkerContext
from tla_service.training import checkpoint as checkpoint_module
from tla_service.training.checkpoint import (
    MANIFEST,
    STATISTICS,
    VALIDATING,
    TrainingState,
    find_damage,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from tla_service.training.pretrained import checkpoint_weights

FACTS = {"class_names": ["a", "b"], "image_shape": [1, 8, 8]}


def small_state(seed: int = 0) -> TrainingState:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    best = {name: value.clone() for name, value in network.state_dict().items()}
    return TrainingState(network, optimizer, step=7, best_weights=best, best={"epoch": 1.0}, history=[{"epoch": 0.0}])


def test_everything_comes_back(tmp_path: Path) -> None:
    state, other = small_state(0), small_state(1)
    save_checkpoint(tmp_path / "c", state, digits_config(), FACTS)
    load_checkpoint(tmp_path / "c", other, digits_config(), FACTS, WorkerContext())
    for name, value in state.network.state_dict().items():
        assert torch.equal(other.network.state_dict()[name], value)
    assert other.step == 7
    assert other.best == {"epoch": 1.0}
    assert other.history == [{"epoch": 0.0}]
    ours, theirs = state.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert all(torch.equal(ours[key]["exp_avg"], theirs[key]["exp_avg"]) for key in ours)


def test_a_checkpoint_that_does_not_tell_its_workers_loads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", small_state(0), digits_config(), FACTS)
    path = tmp_path / "c" / "state.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "workers"}))
    other = small_state(1)
    load_checkpoint(tmp_path / "c", other, digits_config(), FACTS, WorkerContext())
    assert (other.step, other.workers) == (7, [])


def test_statistics_may_be_channels_last(tmp_path: Path) -> None:
    maps = torch.rand(1, 2, 3, 3).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "c", small_state(), digits_config(), FACTS, statistics=[{"maps": maps}])
    assert torch.equal(load_file(tmp_path / "c" / STATISTICS)["0.maps"], maps)


def test_another_number_of_workers_starts_with_the_mean_of_the_statistics(tmp_path: Path) -> None:
    """In a checkpoint within an epoch; the same number goes on with each worker's own."""
    state = small_state(0)
    saved = [{name: value + rank for name, value in state.statistics.items()} for rank in range(2)]
    assert list(saved[0]) == ["network.1.running_mean", "network.1.running_var"]
    save_checkpoint(tmp_path / "c", state, digits_config(), FACTS, statistics=saved)
    for size in (1, 2, 3):
        for rank in range(size):
            other = small_state(1)
            load_checkpoint(tmp_path / "c", other, digits_config(), FACTS, WorkerContext(rank, size))
            for name, value in other.own_statistics.items():
                expected = saved[rank][name] if size == 2 else (saved[0][name] + saved[1][name]) / 2
                assert torch.equal(value, expected)


def test_channels_last_weights_are_saved_and_come_back(tmp_path: Path) -> None:
    state, other = small_state(0), small_state(1)
    state.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_checkpoint(tmp_path / "c", state, digits_config(), FACTS)
    load_checkpoint(tmp_path / "c", other, digits_config(), FACTS, WorkerContext())
    assert torch.equal(other.network.state_dict()["0.weight"], state.network.state_dict()["0.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors", "optimizer.pt", "state.json", "config.yaml"])
def test_a_changed_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "c", small_state(), digits_config(), FACTS)
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnavailableError, match=f"{name} is corrupted"):
        verify_checkpoint(tmp_path / "c")
    path.unlink()
    with pytest.raises(UnavailableError, match=f"{name} is missing"):
        verify_checkpoint(tmp_path / "c")


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"manifest\.json is missing or cannot be read"):
        verify_checkpoint(tmp_path)


def test_a_failure_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "c", small_state(0), digits_config(), FACTS)
    before = json.loads((tmp_path / "c" / "manifest.json").read_text())

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "to_yaml", no_space)
    with pytest.raises(UnavailableError, match=r"checkpoint=.*/c: the disk is full; free some space"):
        save_checkpoint(tmp_path / "c", small_state(1), digits_config(), FACTS)
    verify_checkpoint(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "manifest.json").read_text()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_best_weights_are_read_alone(tmp_path: Path) -> None:
    state = small_state()
    save_checkpoint(tmp_path / "c", state, digits_config(), FACTS)
    weights = checkpoint_weights(str(tmp_path / "c"))
    assert all(torch.equal(weights[name], value) for name, value in state.best_weights.items())
    with pytest.raises(UnavailableError, match=r"model\.pretrained"):
        checkpoint_weights(str(tmp_path / "nowhere"))


def test_other_data_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", small_state(), digits_config(), FACTS)
    with pytest.raises(ConfigError, match="the data set is not the one that this run began with"):
        load_checkpoint(
            tmp_path / "c", small_state(1), digits_config(), FACTS | {"fingerprint": "other"}, WorkerContext()
        )


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "deep", "numbers", "nul"])
def test_a_manifest_or_a_file_that_is_none_is_damage(tmp_path: Path, kind: str) -> None:
    save_checkpoint(tmp_path / "c", small_state(), digits_config(), FACTS)
    odd = {"deep": "[" * 100_000, "numbers": "[[1, 2]]", "nul": '{"a\\u0000": "x"}'}
    for name in (MANIFEST, "best.safetensors"):
        path = tmp_path / "c" / name
        whole = path.read_bytes()
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            path.write_text(odd[kind])
        assert find_damage(tmp_path / "c").startswith((name, "1 is", "a\0 is"))
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(whole)
    assert find_damage(tmp_path / "c") == ""


def test_what_an_interrupted_upload_left_in_the_folder_is_not_loaded(tmp_path: Path) -> None:
    """On S3 a checkpoint replaces one of the same name file by file."""
    state = small_state(0)
    save_checkpoint(tmp_path / "c", state, digits_config(), FACTS)
    save_file({f"0.{name}": value + 1 for name, value in state.statistics.items()}, tmp_path / "c" / STATISTICS)
    save_file(state.best_weights, tmp_path / "c" / VALIDATING)
    other = small_state(1)
    load_checkpoint(tmp_path / "c", other, digits_config(), FACTS, WorkerContext())
    assert (other.own_statistics, other.validating_weights, other.validating) == ({}, {}, -1)
