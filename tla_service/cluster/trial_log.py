"""Trials on the terminal, in `log.jsonl` and in MLflow: a parent run with a nested run per trial, live."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ray.tune.experiment import Trial as TuneTrial

from tla_service.cluster.attempts import DriverCallback, Plan, add_attempt
from tla_service.config import RunConfig
from tla_service.errors import UserError
from tla_service.tracking.connection import tracking_uri
from tla_service.tracking.run_log import RunLog
from tla_service.tracking.runs import finish_run, log_files, open_run, tag_run
from tla_service.training.reporting import JsonLines, Terminal
from tla_service.tuning.axes import shown
from tla_service.tuning.trials import Trial

_log = logging.getLogger(__name__)
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_STATUS: dict[str, RunStatus] = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "running": "KILLED"}
CLOSE_SECONDS = 60.0


class TrialLines(DriverCallback):
    """Shows what trials report, and writes it to `log.jsonl` in a folder."""

    def __init__(self, terminal: Terminal, output: Path) -> None:
        self.say, self._lines = terminal.say, JsonLines(output / "log.jsonl")

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Close the log."""
        self._lines.close()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Show the trial's point."""
        point = trial.config["trial"]["point"]
        self._tell(trial, "suggested", shown(point), point=point)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Show validations and messages."""
        metrics = result["metrics"]
        if result["message"]:
            self._tell(trial, "message", result["message"])
        if metrics and "validation/robust_accuracy" in metrics[-1]:
            robust, clean = (metrics[-1][f"validation/{name}_accuracy"] for name in ("robust", "clean"))
            text = f"epoch {metrics[-1]['epoch']:.0f}  validation robust {robust:.1%}  clean {clean:.1%}"
            self._tell(trial, "epoch", text, metrics=metrics[-1])

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Show how it ended."""
        ended = add_attempt({}, trial)
        reason = f" ({ended.reason})" if ended.reason else ""
        accuracies = [f"{name.removesuffix('_accuracy')} {value:.1%}" for name, value in ended.best_accuracies.items()]
        best = f", best validation {'  '.join(accuracies)}" if accuracies else ""
        self._tell(trial, "ended", f"{ended.status}{reason}{best}", status=ended.status, reason=ended.reason)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its process died and is restarted."""
        self._tell(trial, "message", "its process died and is restarted")

    def _tell(self, trial: TuneTrial, event: str, text: str, **fields: Any) -> None:
        number = trial.config["trial"]["number"]
        self.say(f"trial {number:>3}  {text}")
        self._lines.write({"event": event, "trial": number, "message": text, **fields})


class TrialLog(TrialLines):
    """Also tracks the trials in MLflow, from a thread, so that a slow server delays nothing.

    The sweep's storage identifies its run there over restarts; `facts` describe its data.
    """

    def __init__(self, terminal: Terminal, output: Path, run: RunConfig, plan: Plan, facts: Mapping[str, str]) -> None:
        super().__init__(terminal, output)
        self._plan, self._unsent = plan, output / "unsent"
        self._facts = dict(facts) | {"sweep": plan.storage}
        self.uri = tracking_uri(run.tracking)
        self.run_id = open_run(run.model_copy(update={"name": plan.space.name}), plan.storage, facts=self._facts)
        self._runs: dict[int, tuple[str, RunLog]] = {}
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._track, name="trial-log", daemon=True)
        self._thread.start()

    def store(self, files: Mapping[str, Path], metrics: Mapping[str, float], attempt: int) -> None:
        """Log files (by their path among the artifacts), and metrics of an attempt, to the parent run."""
        try:
            log_files(self.uri, self.run_id, files)
            with contextlib.closing(RunLog(self.uri, self.run_id, self._unsent)) as log:
                log.log(metrics, attempt)
        except UserError as error:
            self.say(f"warning: {error}")

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Close the runs of unfinished trials, the parent run, and the log."""
        self._work.put(self._close_unfinished)
        self._work.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self.say(f"warning: {self.uri} is slow: it may lack the last figures of trials")
        with contextlib.suppress(UserError):
            finish_run(self.uri, self.run_id, status)
        super().close()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Open the trial's run, or continue it."""
        super().on_trial_start(iteration, trials, trial)
        self._work.put(lambda: self._open(Trial(**trial.config["trial"])))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Track every epoch; RunLog leaves out what MLflow already has."""
        super().on_trial_result(iteration, trials, trial, result)
        number, metrics = trial.config["trial"]["number"], result["metrics"]
        self._work.put(lambda: self._track_epochs(number, metrics))

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Close its run."""
        super().on_trial_complete(iteration, trials, trial)
        ended = add_attempt({}, trial)
        self._work.put(lambda: self._close(ended))

    def _track(self) -> None:
        while (action := self._work.get()) is not None:
            try:
                action()
            except UserError as error:
                _log.warning("%s", error)  # the next attempt opens the run again, and has the whole history
            except Exception as error:  # noqa: BLE001 - what a server answers must not end a sweep
                _log.warning("MLflow: %s", " ".join(str(error).split())[:300])

    def _open(self, trial: Trial) -> None:
        if trial.number in self._runs:
            return  # its process was restarted
        run = self._plan.space.trial(trial.number, trial.point, self._plan.placement.num_workers)
        facts = self._facts | {"trial": str(trial.number)}
        facts |= {f"searched.{name}": shown(value) for name, value in trial.point.items()}
        use_gpu, key = self._plan.placement.use_gpu, f"{self._plan.storage}/{run.name}"
        run_id = open_run(run, key, facts=facts, parent_run_id=self.run_id, use_gpu=use_gpu)
        self._runs[trial.number] = (run_id, RunLog(self.uri, run_id, self._unsent))

    def _track_epochs(self, number: int, history: list[Mapping[str, float]]) -> None:
        if number in self._runs:
            for metrics in history:
                self._runs[number][1].log_epoch(metrics)

    def _close_unfinished(self) -> None:
        for number in list(self._runs):
            self._finish(number, "KILLED")

    def _close(self, trial: Trial) -> None:
        if trial.number not in self._runs:
            return
        run_id, metrics = self._runs[trial.number]
        values = {f"best/{name}": value for name, value in trial.best_accuracies.items()}
        metrics.log(values | {f"test/{name}": value for name, value in trial.test.items()}, max(0, trial.epochs - 1))
        tag_run(self.uri, run_id, {"tla.trial_status": trial.status, "tla.trial_reason": trial.reason})
        self._finish(trial.number, _STATUS[trial.status])

    def _finish(self, number: int, status: RunStatus) -> None:
        run_id, metrics = self._runs.pop(number)
        metrics.close()
        with contextlib.suppress(UserError):
            finish_run(self.uri, run_id, status)
