"""A sweep on the terminal and in MLflow: a parent run, and under it a run a trial, live."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from tla_service import registry
from tla_service.config import RunConfig
from tla_service.errors import UserError
from tla_service.training.reporting import JsonLines, Terminal
from tla_service.tuning.axes import shown
from tla_service.tuning.trial import PREFIX, Trial

_log = logging.getLogger(__name__)
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_STATUS: dict[str, RunStatus] = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "running": "KILLED"}


class SweepLog:
    """Shows, logs and tracks what happens to trials. MLflow is spoken to in a thread: a slow server holds nobody up.

    Args:
        terminal: Where to show it.
        output: Folder for `log.jsonl`, and for metrics that the server has not got yet.
        base: The run that is varied.
        key: What identifies the sweep over restarts.
        facts: What describes its data.
    """

    def __init__(self, terminal: Terminal, output: Path, base: RunConfig, key: str, facts: Mapping[str, str]) -> None:
        self._terminal, self._output, self._key, self._facts = terminal, output, key, dict(facts)
        self._lines = JsonLines(output / "log.jsonl")
        self.uri = registry.tracking_uri(base.tracking)
        self.run_id = registry.open_run(base, key, facts=self._facts | {"sweep": key})
        self._runs: dict[int, tuple[str, registry.RunLog]] = {}
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._track, name="sweep-tracking", daemon=True)
        self._thread.start()

    def began(self, trial: Trial, run: RunConfig) -> None:
        """Open the trial's run in MLflow, or continue it."""
        self._say(trial, "is chosen: " + shown(trial.point))
        self._lines.write({"event": "chosen", "trial": trial.number, "point": trial.point})
        self._work.put(lambda: self._open(trial, run))

    def epoch(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Show validated epochs, track all of them; what MLflow has already is left out."""
        if f"{PREFIX}robust_accuracy" in metrics and metrics["epoch"] >= trial.epochs_done:
            robust, clean = metrics[f"{PREFIX}robust_accuracy"], metrics[f"{PREFIX}clean_accuracy"]
            self._say(trial, f"epoch {metrics['epoch']:.0f}  validation robust {robust:.1%}  clean {clean:.1%}")
            self._lines.write({"event": "epoch", "trial": trial.number, "metrics": dict(metrics)})
        self._work.put(lambda: self._log(trial.number, dict(metrics)))

    def told(self, trial: Trial, message: str) -> None:
        """Show a message."""
        self._say(trial, message)
        self._lines.write({"event": "message", "trial": trial.number, "message": message})

    def ended(self, trial: Trial) -> None:
        """Show how it ended, and close its run."""
        best = trial.value("robust_accuracy")
        self._say(trial, f"{trial.status}{f' ({trial.reason})' if trial.reason else ''}"
                  + (f", best validation robust {best:.1%}" if best is not None else ""))  # fmt: skip
        self._lines.write({"event": "ended", "trial": trial.number, "status": trial.status, "reason": trial.reason})
        self._work.put(lambda: self._close(trial))

    def say(self, text: str) -> None:
        """Show a line."""
        self._terminal.say(text)

    def store(self, files: Mapping[str, Path], metrics: Mapping[str, float], attempt: int) -> None:
        """Give files and figures to the parent run; a server that is away leaves them in the output folder."""
        try:
            registry.log_files(self.uri, self.run_id, files)
            with contextlib.closing(registry.RunLog(self.uri, self.run_id, self._output / "unsent")) as log:
                log.log(metrics, attempt)
        except UserError as error:
            self.say(f"warning: {error}")

    def drain(self, timeout_seconds: float = 120.0) -> None:
        """Wait until what happened so far is tracked."""
        done = threading.Event()
        self._work.put(done.set)
        done.wait(timeout_seconds)

    def close(self, status: RunStatus) -> None:
        """Close the runs of trials that are still under way, and the parent's."""
        self._work.put(None)
        self._thread.join(60.0)
        for number in list(self._runs):
            self._finish(number, "KILLED")
        with contextlib.suppress(UserError):
            registry.finish_run(self.uri, self.run_id, status)
        self._lines.close()

    # ------------------------------------------------------------------------------------------------ in the thread

    def _track(self) -> None:
        while (action := self._work.get()) is not None:
            try:
                action()
            except UserError as error:
                _log.warning("%s", error)  # the journal has it all; the next attempt opens the run again
            except Exception as error:  # noqa: BLE001 - what a server answers must not end a sweep
                _log.warning("MLflow: %s", " ".join(str(error).split())[:300])

    def _open(self, trial: Trial, run: RunConfig) -> None:
        facts = self._facts | {"sweep": self._key, "trial": str(trial.number)}
        facts |= {f"searched.{name}": shown(value) for name, value in trial.point.items()}
        run_id = registry.open_run(run, f"{self._key}/{trial.number}", facts=facts, parent_run_id=self.run_id)
        self._runs[trial.number] = (run_id, registry.RunLog(self.uri, run_id, self._output / "unsent"))

    def _log(self, number: int, metrics: Mapping[str, float]) -> None:
        if number in self._runs:
            values = {name: value for name, value in metrics.items() if name != "epoch"}
            self._runs[number][1].log(values, int(metrics["epoch"]))

    def _close(self, trial: Trial) -> None:
        if trial.number not in self._runs:
            return
        run_id, metrics = self._runs[trial.number]
        best = trial.best()
        values = {f"best/{name.removeprefix(PREFIX)}": value for name, value in (best or {}).items() if PREFIX in name}
        metrics.log(
            values | {f"test/{name}": value for name, value in trial.test.items()}, max(0, trial.epochs_done - 1)
        )
        registry.tag_run(self.uri, run_id, {"tla.trial_status": trial.status, "tla.trial_reason": trial.reason})
        self._finish(trial.number, _STATUS[trial.status])

    def _finish(self, number: int, status: RunStatus) -> None:
        run_id, metrics = self._runs.pop(number)
        metrics.close()
        with contextlib.suppress(UserError):
            registry.finish_run(self.uri, run_id, status)

    def _say(self, trial: Trial, text: str) -> None:
        self._terminal.say(f"trial {trial.number:>3}  {text}")
