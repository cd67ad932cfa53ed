"""Ray Tune's searcher, scheduler and stopper, all three doing what the conductor says."""

import json
import time
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from tla_service.cluster.slots import Room
from tla_service.errors import UnavailableError
from tla_service.tuning.conductor import Conductor


class _Stateless:
    """Ray Tune writes its parts down for its own restore, which is not used; what they hold cannot be written."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Suggestions(_Stateless, Searcher):
    """Hands the conductor's trials to Ray Tune, as many at a time as there is room for."""

    def __init__(self, conductor: Conductor, watch: "Watch", room: Room) -> None:
        super().__init__()
        self._conductor, self._watch, self._room = conductor, watch, room
        self._under_way: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """A trial's number and its run; None for not now; or Ray Tune's word for the end."""
        with self._watch:
            if len(self._under_way) >= self._room.limit(self._conductor.num_training):
                return None
            chosen = self._conductor.choose()
            if chosen is not None:
                trial, run = chosen
                self._under_way.add(trial_id)
                return {"number": trial.number, "run": run.model_dump_json()}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Make room; what came out the scheduler below has passed on."""
        self._under_way.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it."""


class Decisions(_Stateless, FIFOScheduler):
    """Passes what trials report to the conductor, and its decisions to Ray Tune."""

    def __init__(self, conductor: Conductor, watch: "Watch") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._conductor, self._watch = conductor, watch

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop the trial or let it go on."""
        with self._watch:
            if not result.get("done") and self._conductor.take(trial.config["number"], json.loads(result["record"])):
                return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)


class Losses(_Stateless, Callback):
    """Tells the conductor of trials that are not started again; the scheduler would hear of every failure."""

    def __init__(self, conductor: Conductor, watch: "Watch") -> None:
        self._conductor, self._watch = conductor, watch

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process died more often than it is started again."""
        with self._watch:
            reason = f"its process died {trial.num_failures} times (killed, or its node was lost)"
            self._conductor.lose(trial.config["number"], reason)


class Watch(_Stateless, Stopper):
    """Ends Ray Tune when the conductor says so, on a signal, or on an error, which is kept to be raised afterwards."""

    def __init__(self, conductor: Conductor, wait_seconds: float) -> None:
        self._conductor, self._wait_seconds = conductor, wait_seconds
        self._began = time.monotonic()
        self.interrupted = False
        self.error: Exception | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial alone."""
        return False

    def stop_all(self) -> bool:
        """Whether to end all trials now; they keep their last checkpoints."""
        if self._wait_seconds and time.monotonic() - self._began > self._wait_seconds and not self._conductor.has_begun:
            self.fail(
                UnavailableError(
                    "scaling.wait_seconds",
                    self._wait_seconds,
                    "the cluster has not placed any trial's workers in this time",
                    "ask for fewer workers, or wait longer",
                )
            )
        return self.interrupted or self.error is not None or self._conductor.is_over()

    def fail(self, error: Exception) -> None:
        """End the sweep with this error."""
        self.error = self.error or error

    def __enter__(self) -> None:
        """Keep what the block raises: Ray Tune would wrap it, and leave trials behind."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, Exception):
            self.fail(error)
            return True
        return False
