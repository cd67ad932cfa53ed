"""A sweep's course, with trials that are played instead of trained; drivers that vanish at any moment."""

import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuning.conftest import space_of
from tla_service.config import RunConfig
from tla_service.errors import UnavailableError
from tla_service.tuning.conductor import Conductor
from tla_service.tuning.journal import Journal
from tla_service.tuning.space import Space
from tla_service.tuning.trial import Trial, winner

SPACE = {"loss.margin": {"low": 0.005, "high": 0.2}, "loss.triplet_weight": {"low": 0.1, "high": 8, "log": True}}


class Silent:
    """Keeps how often each trial began and ended."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.over: list[int] = []

    def began(self, trial: Trial, run: RunConfig) -> None:  # noqa: ARG002
        self.begun.append(trial.number)

    def epoch(self, trial: Trial, metrics: Mapping[str, float]) -> None: ...

    def told(self, trial: Trial, message: str) -> None: ...

    def ended(self, trial: Trial) -> None:
        self.over.append(trial.number)


class KilledError(Exception):
    """The driver is gone."""


class Play:
    """Trials with a checkpoint every third epoch: what a killed driver leaves behind is where they go on from.

    Args:
        space: What is searched.
        storage: Where the journal is.
        slots: Trials at a time.
    """

    def __init__(self, space: Space, storage: Path, slots: int = 1) -> None:
        self.space, self.storage, self.slots = space, storage, slots
        self.trained: dict[int, list[int]] = {}
        self.checkpoints: dict[int, int] = {}
        self.running: list[tuple[Trial, int]] = []
        self.listener = Silent()

    def run(self, events: int | None = None) -> Conductor:
        """Drive until the end, or until killed after so many events."""
        left = [events]

        def tick() -> None:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise KilledError

        conductor = Conductor(self.space, "play", Journal(str(self.storage)), self.listener, num_workers=2)
        self.running = running = []
        while True:
            while len(running) < self.slots and (chosen := conductor.choose()) is not None:
                trial, run = chosen
                assert run.name == f"play-{trial.number:04d}"
                epoch = self.checkpoints.get(trial.number, 0)
                history = [metrics(trial, done) for done in range(epoch)]
                start = {"event": "start", "time": time.time(), "resumed": epoch > 0, "history": history}
                if not conductor.take(trial.number, start):
                    running.append((trial, epoch))
                tick()
            if not running:
                return conductor
            trial, epoch = running.pop(0)
            if epoch == 27:
                conductor.take(trial.number, {"event": "end", "history": [], "test": {}, "wall_seconds": {}})
                tick()
                continue
            self.train(trial, epoch)
            stop = conductor.take(trial.number, {"event": "epoch", "time": 0.0, "metrics": metrics(trial, epoch)})
            if not stop:
                running.append((trial, epoch + 1))
            tick()

    def train(self, trial: Trial, epoch: int) -> None:
        self.trained.setdefault(trial.number, []).append(epoch)
        if (epoch + 1) % 3 == 0:
            self.checkpoints[trial.number] = epoch + 1

    def train_on(self, epochs: int) -> None:
        """What workers still do after their driver was killed, and nobody hears of."""
        for trial, epoch in self.running:
            for unheard in range(epoch, min(27, epoch + epochs)):
                self.train(trial, unheard)


def metrics(trial: Trial, epoch: int) -> dict[str, float]:
    goal = float(np.exp(-((trial.point["loss.margin"] - 0.05) ** 2) / 0.01))
    robust = goal * (1 - 0.9 ** (epoch + 1))
    return {"epoch": float(epoch), "validation/robust_accuracy": robust, "validation/clean_accuracy": 0.9}


def told(trials: list[Trial]) -> list[tuple[Any, ...]]:
    """What came out, without times."""
    return [(t.number, str(t.point), t.status, t.reason, json.dumps(t.reports)) for t in trials]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Play]:
    def make(name: str, slots: int = 1, **sweep: Any) -> Play:
        settings = {"num_samples": 10, "grace_epochs": 3, "startup_trials": 4} | sweep
        return Play(space_of(SPACE, **settings), tmp_path / name, slots)

    return make


def test_a_sweep_runs_to_its_end_and_stops_those_behind(play: Callable[..., Play]) -> None:
    undisturbed = play("a")
    trials = undisturbed.run().trials
    assert len(trials) == 10
    assert {trial.status for trial in trials} == {"finished", "stopped"}
    stopped = [trial for trial in trials if trial.status == "stopped"]
    assert all(
        trial.epochs_done in (3, 9) and trial.reason.startswith("behind the others at epoch") for trial in stopped
    )
    assert undisturbed.listener.begun == undisturbed.listener.over == list(range(10))
    best = winner(trials, "robust_accuracy")
    assert best is not None
    assert best.value("robust_accuracy") == max(trial.value("robust_accuracy") for trial in trials)


@pytest.mark.parametrize("seed", range(3))
def test_a_driver_killed_again_and_again_comes_to_the_same_end(play: Callable[..., Play], seed: int) -> None:
    expected = told(play("a").run().trials)
    rng = np.random.default_rng(seed)
    killed, kills = play("b"), 0
    while True:
        try:
            trials = killed.run(int(rng.integers(1, 40))).trials
            break
        except KilledError:
            kills += 1
            killed.train_on(int(rng.integers(0, 8)))
    assert kills > 2
    assert told(trials) == expected
    # Each trial ended once, whatever happened; and none goes back behind its last checkpoint.
    assert sorted(killed.listener.over) == list(range(10))
    for epochs in killed.trained.values():
        assert sorted(set(epochs)) == list(range(max(epochs) + 1))
        assert all(after == before + 1 or after % 3 == 0 for before, after in itertools.pairwise(epochs))


def test_with_several_at_a_time_every_trial_is_accounted_for_once(play: Callable[..., Play]) -> None:
    killed = play("a", slots=3)
    for events in (5, 12, 30, 50):
        with pytest.raises(KilledError):
            killed.run(events)
    trials = killed.run().trials
    assert [trial.number for trial in trials] == list(range(10))
    assert all(trial.status in ("finished", "stopped") for trial in trials)
    assert sorted(killed.listener.over) == list(range(10))
    for trial in trials:
        epochs = [report["epoch"] for report in trial.reports]
        assert epochs == sorted(set(epochs))


def test_rungs_are_those_of_before_after_a_restart(play: Callable[..., Play]) -> None:
    """The first trial after a restart is measured against all that came before it."""
    before = play("a", num_samples=4)
    before.run()
    after = play("a", num_samples=5)
    after.run()
    known = play("b", num_samples=5).run().trials
    assert told(Journal(str(after.storage)).trials()) == told(known)
    assert after.trained.keys() == {4}


def test_budgets_end_a_sweep_and_can_be_raised(play: Callable[..., Play]) -> None:
    sweep = play("a", max_gpu_hours=1e-9)
    conductor = sweep.run()
    assert len(conductor.trials) <= 1
    assert conductor.halted == "sweep.max_gpu_hours=1e-09 are used"
    more = play("a").run()
    assert len(more.trials) == 10
    assert not more.halted


def test_wall_time_adds_up_over_attempts(tmp_path: Path) -> None:
    now = [1000.0]
    space = space_of(SPACE, max_hours=1)
    make = Conductor(
        space, "c", Journal(str(tmp_path)), Silent(), num_workers=1, seconds_before=3000, clock=lambda: now[0]
    )
    assert not make.is_over()
    now[0] += 601
    assert make.is_over()
    assert make.choose() is None


def test_failed_trials_are_recorded_and_too_many_end_the_sweep(tmp_path: Path) -> None:
    space = space_of(SPACE, num_samples=10, failures_in_a_row=3)
    conductor = Conductor(space, "c", Journal(str(tmp_path)), Silent(), num_workers=1)
    for number in range(3):
        assert conductor.choose() is not None
        conductor.take(number, {"event": "failed", "reason": "the loss is not finite by step 7"})
    assert conductor.choose() is None
    assert conductor.failed_for.startswith("3 trials failed one after another, the last: the loss is not finite")
    kept = Journal(str(tmp_path)).trials()
    assert [(trial.status, trial.reason) for trial in kept] == [("failed", "the loss is not finite by step 7")] * 3
    assert winner(kept, "robust_accuracy") is None


def test_one_success_between_failures_counts_anew(tmp_path: Path) -> None:
    space = space_of(SPACE, num_samples=10, failures_in_a_row=2)
    conductor = Conductor(space, "c", Journal(str(tmp_path)), Silent(), num_workers=1)
    for number, event in enumerate(("failed", "end", "failed")):
        conductor.choose()
        conductor.take(number, {"event": event, "reason": "x", "history": [], "test": {}, "wall_seconds": {}})
    conductor.lose(2, "its process died")
    assert [trial.reason for trial in conductor.trials] == ["x", "", "x"]
    assert not conductor.failed_for


def test_epochs_that_are_told_again_after_a_restart_count_once(tmp_path: Path) -> None:
    conductor = Conductor(space_of(SPACE), "c", Journal(str(tmp_path)), Silent(), num_workers=1)
    trial, _ = conductor.choose() or pytest.fail("nothing chosen")
    for epoch in (0, 1, 2, 1, 2, 3):
        conductor.take(0, {"event": "epoch", "time": 0.0, "metrics": metrics(trial, epoch)})
    assert [report["epoch"] for report in trial.reports] == [0, 1, 2, 3]


def test_a_storage_that_is_full_is_said_so(tmp_path: Path) -> None:
    conductor = Conductor(space_of(SPACE), "c", Journal(str(tmp_path)), Silent(), num_workers=1)
    (tmp_path / "trials").write_text("in the way")
    with pytest.raises(UnavailableError, match=r"scaling\.storage=.*: cannot be read or written"):
        conductor.choose()
