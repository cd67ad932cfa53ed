"""A run with extra images: resumed bit for bit, recorded, and refused where they are other ones, or leak."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conftest import KeepingReporter, digits_config, fit, weights_of, without_speed
from tla_service.config import RunConfig
from tla_service.data import load_dataset
from tla_service.errors import ConfigError
from tla_service.runtime import WorkerContext

NewReporter = Callable[..., KeepingReporter]
NOISE = np.random.default_rng(0).integers(0, 256, (90, 8, 8), np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "extra.npz"
    np.savez(path, image=NOISE, label=np.arange(90) % 10)
    return path


@pytest.fixture
def config(file: Path, tmp_path: Path) -> RunConfig:
    """Two epochs of 5 steps, of 36 training and 14 extra images each."""
    extra = {"path": str(file), "share": 0.28, "duplicates": "drop"}
    data = {"cache_dir": str(tmp_path / "cache"), "extra": extra, "flip": True}
    return digits_config(data=data, method="at", training={"epochs": 2})


def test_a_resumed_run_ends_the_same_bit_for_bit(new_reporter: NewReporter, config: RunConfig) -> None:
    whole, stopped = new_reporter(), new_reporter(stop_after=1)
    uninterrupted = fit(config, WorkerContext(), whole)
    assert whole.metrics[-1]["step"] == 10
    assert uninterrupted.facts["extra_images"] == "90"
    assert uninterrupted.facts["training_images"] == "180"

    assert fit(config, WorkerContext(), stopped).interrupted
    for checkpoint in (whole.checkpoints[0], stopped.checkpoints[-1]):
        second = new_reporter(resume_from=checkpoint)
        resumed = fit(config, WorkerContext(), second)
        assert weights_of(second.checkpoints[-1]) == weights_of(whole.checkpoints[-1])
        assert without_speed(resumed.history) == without_speed(uninterrupted.history)


def test_a_run_resumes_with_the_same_extra_images_only(
    new_reporter: NewReporter, config: RunConfig, file: Path
) -> None:
    first = new_reporter()
    fit(config, WorkerContext(), first)
    moved = file.rename(file.with_name("moved.npz"))
    extra = config.data.extra.model_copy(update={"path": str(moved)})
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"extra": extra})})
    assert fit(elsewhere, WorkerContext(), new_reporter(resume_from=first.checkpoints[0])).history

    test = load_dataset(config.data).test.fetch(torch.tensor([3]))[:, 0].numpy()
    for changed in (NOISE[::-1], np.concatenate([NOISE[1:], test])):
        np.savez(file, image=changed, label=np.arange(90) % 10)
        with pytest.raises(ConfigError, match=r"data\.extra\.path=.*: the extra images are not those that this run"):
            fit(config, WorkerContext(), new_reporter(resume_from=first.checkpoints[0]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "path alone": ({"data": {"extra": {"path": "x"}}}, "data.extra.share=None: not set with data.extra.path"),
    "share alone": ({"data": {"extra": {"share": 0.5}}}, "data.extra.share=0.5: set without data.extra.path"),
    "all extra": (
        {"data": {"extra": {"path": "x", "share": 0.9}}, "training": {"global_batch_size": 4}},
        "data.extra.share=0.9: of 4 images, 4 would be extra images; use a larger training.global_batch_size",
    ),
    "none extra": (
        {"data": {"extra": {"path": "x", "share": 0.1}}, "training": {"global_batch_size": 4}},
        "data.extra.share=0.1: of 4 images, 0 would be",
    ),
    "class weights": (
        {"data": {"extra": {"path": "x", "share": 0.5}, "balance": "class_weights"}},
        "data.balance=class_weights: ",
    ),
    "a pool": (
        {"data": {"extra": {"path": "x", "share": 0.5}}, "mining": {"pool": "separate"}},
        "mining.pool=separate",
    ),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_contradict_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        RunConfig.model_validate(changes)
    assert words in str(caught.value)
