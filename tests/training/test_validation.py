"""Validation beside training: whatever its delay, the run ends as if it had waited for each."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.conftest import KeepingReporter, digits_config, weights_of, without_speed
from tla_service.evaluation import suite
from tla_service.runtime import WorkerContext
from tla_service.training import validation
from tla_service.training.fit import Run
from tla_service.training.output import FitResult
from tla_service.training.validation import ImageSet

CONFIG = digits_config(
    training={"epochs": 6, "ema_decay": 0.9}, evaluation={"every_epochs": 2, "validation": {"num_steps": 2}}
)


class LateValidator:
    """Answers after so many questions, or never."""

    def __init__(self, questions: float) -> None:
        self.questions, self.asked, self.submitted = questions, 0, 0
        self.run: Run | None = None
        self._weights: Mapping[str, Tensor] = {}

    def submit(self, weights: Mapping[str, Tensor]) -> None:
        assert not self._weights, "one at a time"
        self._weights, self.asked, self.submitted = dict(weights), 0, self.submitted + 1

    def poll(self) -> dict[str, float] | None:
        self.asked += 1
        assert self.asked < 1000
        if self.asked < self.questions:
            return None
        assert self.run is not None
        network = self.run.build()
        network.load_state_dict(self._weights)
        self._weights = {}
        images = ImageSet.validation(CONFIG, self.run.validation, None)
        return images.measure_for(1, network, torch.device("cpu"))


def new_run(reporter: KeepingReporter, validator: LateValidator | None = None) -> Run:
    run = Run(CONFIG, WorkerContext(), reporter, validator=validator)
    if validator is not None:
        validator.run = run
    run.start(None)
    return run


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], FitResult, list[str]]:
    """Weights and result of the run that waits for each validation, and the names of its last epoch's metrics."""
    reporter = KeepingReporter(tmp_path_factory.mktemp("waited"))
    result = new_run(reporter).train()
    return weights_of(reporter.checkpoints[-1]), result, list(reporter.metrics[-1])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "POLL_SECONDS", 0.001)


@pytest.mark.parametrize("questions", [1, 20])
def test_a_late_validation_changes_nothing_but_when_it_is_known(
    reporter: KeepingReporter, waited: tuple[dict[str, bytes], FitResult, list[str]], questions: int
) -> None:
    weights, expected, names_at_the_end = waited
    validator = LateValidator(questions)
    found = new_run(reporter, validator).train()
    assert weights_of(reporter.checkpoints[-1]) == weights
    assert without_speed(found.history) == without_speed(expected.history)
    assert found.test == expected.test
    assert without_speed([found.best]) == without_speed([expected.best])
    assert validator.submitted == 3
    told = [record["metrics"] for record in reporter.records if record["event"] == "validation"]
    names = [name for name in expected.history[1] if name.startswith("validation/")]
    assert told == [{"epoch": epoch, **{name: expected.history[epoch][name] for name in names}} for epoch in (1, 3)]
    assert list(reporter.metrics[-1]) == names_at_the_end


@pytest.mark.parametrize("still_beside", [True, False], ids=["again beside training", "by the workers"])
def test_a_validation_that_a_restart_cut_off_is_made_again(
    new_reporter: Callable[..., KeepingReporter],
    waited: tuple[dict[str, bytes], FitResult, list[str]],
    *,
    still_beside: bool,
) -> None:
    first = new_reporter()
    run = new_run(first, LateValidator(float("inf")))
    for _ in range(2):
        assert run.train_epoch()
        run.finish_epoch()
    assert (first.checkpoints[-1] / "validating.safetensors").exists()
    resumed = new_reporter(resume_from=first.checkpoints[-1])
    found = new_run(resumed, LateValidator(2) if still_beside else None).train()
    assert weights_of(resumed.checkpoints[-1]) == waited[0]
    assert without_speed(found.history) == without_speed(waited[1].history)
    assert not (resumed.checkpoints[-1] / "validating.safetensors").exists()


def test_what_training_waits_for_is_said_once(
    new_reporter: Callable[..., KeepingReporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "TELL_SECONDS", 0.01)
    reporter = new_reporter()
    new_run(reporter, LateValidator(100)).train()
    told = [record["message"] for record in reporter.records if record["event"] == "waiting"]
    assert told[0] == ("training waits for the validation of epoch 1: it is slow, or the cluster has no room for it")
    assert len(told) == 3


def test_the_measurement_for_two_workers_is_theirs(reporter: KeepingReporter, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(reporter)
    images = ImageSet.validation(CONFIG, run.validation, None)
    counts: list[Tensor] = []

    def add(values: Tensor, _context: Any) -> Tensor:
        counts.append(values)
        return torch.stack(counts).sum(0)

    monkeypatch.setattr(suite, "all_reduce_sum", add)
    both = [images.measure(run.state.network, WorkerContext(rank, world_size=2)) for rank in (0, 1)]
    assert images.measure_for(2, run.state.network, torch.device("cpu")) == both[-1]
    assert counts[0][0] + counts[1][0] == len(run.validation[1])
