"""Whole runs: exact resumption, the choice of weights, one look at the test set, and how runs end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.conftest import KeepingReporter, digits_config, fit, weights_of, without_speed
from tla_service.models import Architecture, build_model
from tla_service.runtime import WorkerContext, average_buffers
from tla_service.training.fit import Run
from tla_service.training.meter import NonFiniteLossError
from tla_service.training.pretrained import checkpoint_weights
from tla_service.training.step import TOTALS
from tla_service.training.validation import ImageSet

NewReporter = Callable[..., KeepingReporter]


class WithDropout(nn.Module):
    """The digits network with dropout on its images: draws from torch's global generator."""

    found = ""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.dropout = network, nn.Dropout(0.2)

    def forward(self, images: torch.Tensor) -> Any:
        return self.network(self.dropout(images))


RUNS: dict[str, dict[str, Any]] = {
    "tla": {},
    "average and augmentation": {
        "training": {"ema_decay": 0.9},
        "data": {"crop_padding": 1, "flip": True},
        "schedule": {"name": "cosine", "warmup": 1},
    },
    "separate pool, both positives, noise": {
        "mining": {
            "pool": "separate",
            "pool_size": 20,
            "positives": "both",
            "clean_noise": 0.05,
            "keep_probability": 0.5,
        },
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "weight_decay": 1e-3, "grad_clip": 1.0},
    },
    "random negatives, a growing radius": {"method": "tla_rn", "attack": {"warmup": 0.8}},
    "balanced sampling": {"method": "at", "data": {"balance": "sampling"}},
    "class weights": {"method": "trades", "data": {"balance": "class_weights"}},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_a_run_resumed_at_or_within_an_epoch_ends_the_same_bit_for_bit(
    new_reporter: NewReporter, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    build = Architecture.build
    monkeypatch.setattr(Architecture, "build", lambda *args: WithDropout(build(*args)))
    config = digits_config(**changes)
    whole, stopped = new_reporter(), new_reporter(stop_after=3)
    uninterrupted = fit(config, WorkerContext(), whole)
    assert fit(config, WorkerContext(), stopped).interrupted
    for checkpoint in (whole.checkpoints[1], stopped.checkpoints[-1]):
        second = new_reporter(resume_from=checkpoint)
        resumed = fit(config, WorkerContext(), second)
        assert weights_of(second.checkpoints[-1]) == weights_of(whole.checkpoints[-1])
        assert without_speed(resumed.history) == without_speed(uninterrupted.history)
        assert resumed.test == uninterrupted.test
        assert len(resumed.history) == config.training.epochs


def test_a_stop_in_the_middle_of_an_epoch_keeps_its_sums(
    new_reporter: NewReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch's means are those over the steps before the stop and after it, added up by hand."""
    of_steps: list[list[float]] = []
    original = Run._update

    def update(self: Run, batch: Any) -> torch.Tensor:
        totals = original(self, batch)
        of_steps.append(totals.tolist())
        return totals

    monkeypatch.setattr(Run, "_update", update)
    config = digits_config(training={"log_every_steps": 1, "epochs": 1})
    stopped = new_reporter(stop_after=1)
    assert fit(config, WorkerContext(), stopped).interrupted
    assert stopped.checkpoints[-1].name == "step-000000002"
    assert len(of_steps) == 2
    assert stopped.metrics == []  # two of four steps are no epoch
    resumed = new_reporter(resume_from=stopped.checkpoints[-1])
    fit(config, WorkerContext(), resumed)
    assert len(of_steps) == 4

    sums = dict(zip(TOTALS, (sum(column) for column in zip(*of_steps, strict=True)), strict=True))
    assert sums["images"] == 180
    (epoch,) = resumed.metrics
    assert {name: epoch[f"train/{name}"] for name in TOTALS[:-1]} == pytest.approx(
        {name: sums[name] / 180 for name in TOTALS[:-1]}
    )


# Epochs 1 and 2 tie on robust accuracy, and the clean one decides; natural training goes by the clean one alone.
@pytest.mark.parametrize(("method", "best"), [("tla", 2), ("natural", 3)])
def test_the_best_weights_are_chosen_on_validation_and_tested_once(
    method: str, best: int, reporter: KeepingReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    robust = iter([0.2, 0.9, 0.9, 0.1])
    measured: list[str] = []
    seen: list[dict[str, torch.Tensor]] = []

    def measure(images: ImageSet, network: nn.Module, _context: WorkerContext) -> dict[str, float]:
        measured.append("test" if list(images.attacks) == ["pgd2"] else "validation")
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        value = next(robust, 0.5)
        return {"robust_accuracy": value, "clean_accuracy": {3: 0.95, 4: 0.97}.get(len(seen), 0.9)}

    monkeypatch.setattr(ImageSet, "measure", measure)
    result = fit(digits_config(method=method), WorkerContext(), reporter)
    assert measured == ["validation"] * 4 + ["test"]
    assert result.best["epoch"] == best
    assert all(torch.equal(seen[best][name], seen[4][name]) for name in seen[best])
    saved = checkpoint_weights(str(reporter.checkpoints[-1]))
    assert all(torch.equal(saved[name], seen[best][name]) for name in saved)


def test_with_an_average_the_average_is_what_counts(reporter: KeepingReporter) -> None:
    config = digits_config(training={"ema_decay": 0.5, "epochs": 1})
    run = Run(config, WorkerContext(), reporter)
    run.start(None)
    by_hand: dict[str, torch.Tensor] = {}
    original = run.state.optimizer.step

    def step() -> None:
        original()
        for name, value in run.state.network.state_dict().items():
            by_hand[name] = value.clone() if name not in by_hand else 0.5 * by_hand[name] + 0.5 * value

    run.state.optimizer.step = step  # type: ignore[method-assign]
    assert run.train_epoch()
    run.finish_epoch()
    for name, value in by_hand.items():
        torch.testing.assert_close(run.state.best_weights[name], value)


def test_max_steps_ends_a_run_within_an_epoch(reporter: KeepingReporter) -> None:
    result = fit(digits_config(training={"max_steps": 6}), WorkerContext(), reporter)
    assert next(record["epochs"] for record in reporter.records if record["event"] == "start") == len(result.history)
    assert [epoch["step"] for epoch in result.history] == [4, 6]
    assert result.test


def test_a_finished_checkpoint_trains_no_more(new_reporter: NewReporter) -> None:
    first = new_reporter()
    done = fit(digits_config(training={"epochs": 1}), WorkerContext(), first)
    second = new_reporter(resume_from=first.checkpoints[-1])
    again = fit(digits_config(training={"epochs": 1}), WorkerContext(), second)
    assert second.metrics == []
    assert again.test == done.test
    assert again.history == done.history


def test_validation_every_other_epoch_saves_only_then(reporter: KeepingReporter) -> None:
    result = fit(digits_config(training={"epochs": 3}, evaluation={"every_epochs": 2}), WorkerContext(), reporter)
    validated = ["validation/robust_accuracy" in epoch for epoch in result.history]
    assert validated == [False, True, True]
    assert [path.name for path in reporter.checkpoints] == ["step-000000008", "step-000000012"]


def test_validation_counts_what_withstands_cross_entropy_and_margin(reporter: KeepingReporter) -> None:
    plain = fit(digits_config(training={"epochs": 1}), WorkerContext(), reporter).best
    both = fit(
        digits_config(training={"epochs": 1}, evaluation={"validation_margin": True}), WorkerContext(), reporter
    ).best
    names = ["validation/robust_accuracy/validation", "validation/robust_accuracy/validation_margin"]
    assert both["validation/robust_accuracy"] <= min(both[name] for name in names)
    assert both[names[0]] == plain["validation/robust_accuracy"]
    assert names[1] not in plain


def test_a_loss_that_is_not_finite_ends_the_run(reporter: KeepingReporter) -> None:
    config = digits_config(optimizer={"name": "sgd", "learning_rate": 1e20})
    with pytest.raises(NonFiniteLossError, match=r"not finite by step \d+; lower optimizer.learning_rate"):
        fit(config, WorkerContext(), reporter)


def test_training_starts_from_given_weights(reporter: KeepingReporter) -> None:
    torch.manual_seed(5)
    weights = build_model("digits_cnn", 10, (1, 8, 8)).state_dict()
    run = Run(digits_config(), WorkerContext(), reporter)
    run.start(weights)
    started = run.state.network.state_dict()
    assert all(torch.equal(started[name], weights[name]) for name in weights)


def test_progress_tells_step_rate_and_time_left(reporter: KeepingReporter) -> None:
    fit(digits_config(), WorkerContext(), reporter)
    steps = [record for record in reporter.records if record["event"] == "step"]
    assert [record["step"] for record in steps] == [2, 6, 10, 14]  # an epoch's end is told by its report
    assert all(record["total_steps"] == 16 and record["images_per_second"] > 0 for record in steps)
    left = [record["seconds_left"] * record["images_per_second"] for record in steps]
    assert left == pytest.approx([45 * steps for steps in (14, 10, 6, 2)], rel=0.5)  # the rate is measured twice


def test_training_makes_the_network_robust(reporter: KeepingReporter) -> None:
    """Learning happens at all: far above the 10% of chance after a few epochs, and better than at the start."""
    config = digits_config(data={"train_limit": 800}, training={"epochs": 8})
    result = fit(config, WorkerContext(), reporter)
    assert result.history[-1]["train/loss"] < 0.7 * result.history[0]["train/loss"]
    assert result.test["clean_accuracy"] > 0.6
    assert result.test["robust_accuracy"] > 0.3


def test_a_single_worker_averages_no_buffers() -> None:
    network = nn.BatchNorm2d(3)
    average_buffers(network, WorkerContext())
    assert torch.equal(network.running_mean, torch.zeros(3))  # type: ignore[arg-type]
