"""A table on a Ray cluster: trained as the trials of a grid, as in a sweep, then measured shard by shard."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tla_service.cluster.attempts import read_trials, seconds_before
from tla_service.cluster.budget import Budget, Plan, stop_on_signal
from tla_service.cluster.folder import Folder
from tla_service.cluster.lease import held
from tla_service.cluster.session import check_dashboard, place, ray_session
from tla_service.cluster.slots import max_concurrent
from tla_service.cluster.storage import RunFolder, check_storage
from tla_service.cluster.tasks import Workers
from tla_service.cluster.trial_log import TrialLines
from tla_service.cluster.tune import run_trials
from tla_service.config import ScalingConfig
from tla_service.config.loading import read_settings
from tla_service.errors import UnavailableError
from tla_service.evaluation.shards import Arrays
from tla_service.files import whole_folder
from tla_service.report.evaluate import evaluate
from tla_service.report.settings import ReportSettings
from tla_service.report.subjects import load_checkpoint_subject, load_models
from tla_service.report.tasks import MissingShard
from tla_service.results.local import Say, Track, reproduce
from tla_service.results.runs import (
    AXIS,
    REPORT,
    TableRun,
    is_trained,
    run_config,
    slim,
    table_space,
    write_report_settings,
)
from tla_service.results.settings import ReproduceSettings
from tla_service.training.checkpoint import verify_checkpoint
from tla_service.training.output import write_config, write_summary
from tla_service.training.reporting import Terminal
from tla_service.tuning.space import Space


def reproduce_on_ray(settings: ReproduceSettings, track: Track | None = None) -> int:
    """Make a table on a cluster; see `reproduce`.

    Raises:
        UserError: Also if no cluster answers, or none of its nodes has room for a run.
    """
    # Trials that are stopped leave their resources to Ray Train's cleanup, which needs the dashboard.
    with ray_session(settings, debug=settings.debug, dashboard=True):
        check_dashboard()
        return reproduce(settings, partial(_make, settings), track)


class _TimeIsUpError(Exception):
    """`minutes` are over."""


class _Deadline(Workers):
    """Workers that measure until the time is up; shards that were saved are kept."""

    def __init__(self, scaling: ScalingConfig, deadline: float) -> None:
        super().__init__(scaling)
        self._deadline = deadline

    def check(self) -> None:
        """Raise once the time is up."""
        if time.monotonic() > self._deadline:
            raise _TimeIsUpError

    def __call__(self, *shards: Any, **named: Any) -> Iterator[tuple[MissingShard, Arrays]]:
        """As `Workers`."""
        for measured in super().__call__(*shards, **named):
            yield measured
            self.check()


def _make(settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], state: Path, say: Say) -> bool:
    deadline = time.monotonic() + 60 * settings.minutes if settings.minutes is not None else float("inf")
    failed = _train(settings, space, runs, state, deadline)
    ready = [run for run in runs if all(is_trained(state / name) for name in (run.name, run.surrogate) if name)]
    workers, terminal = _Deadline(settings.scaling, deadline), Terminal()
    try:
        for run in ready:
            workers.check()
            say(f"{run.name}: evaluation")
            path = write_report_settings(settings, run, state)
            report = read_settings(ReportSettings, ["--config", str(path)])
            models = load_models(report, load_checkpoint_subject)
            evaluate(report, models, lambda: contextlib.nullcontext(workers), terminal)
            shutil.rmtree(path.parent / REPORT / "shards")
    except _TimeIsUpError:
        return False
    if failed is not None:
        raise failed
    return len(ready) == len(runs)


def _train(
    settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], state: Path, deadline: float
) -> UnavailableError | None:
    """Train the runs that are missing, and bring their best weights to the state folder; returns a failure."""
    uri = f"{settings.scaling.storage or state / 'ray'}/{space.name}"
    check_storage(uri)
    terminal = Terminal()
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(held(Folder(uri), terminal.say))
        placement = place(space.run)
        _fetch_trained(settings, space, runs, uri, state)
        missing = [run for run in runs if not is_trained(state / run.name)]
        if not missing:
            return None
        hours = None
        if settings.minutes is not None:  # a sweep counts all attempts
            hours = max(1e-6, seconds_before(uri) + deadline - time.monotonic()) / 3600
        grid = table_space(settings, missing, max_hours=hours)
        concurrent = max_concurrent(space.run.scaling, settings.side_by_side, placement)
        plan = Plan(grid, uri, placement, None, concurrent, space.run.scaling.wait_seconds, repeat_failed=True)
        budget = Budget(plan)
        lease.check()
        lease.lost = budget.fail
        lines = TrialLines(terminal, state)
        stack.callback(lines.close)
        with stop_on_signal(budget):
            run_trials(plan, budget, lines, debug=settings.debug)
        if budget.error is not None:
            raise budget.error
        _fetch_trained(settings, space, runs, uri, state)
        if budget.interrupted:
            raise KeyboardInterrupt
        failed = [trial for trial in read_trials(uri) if trial.status == "failed"]
    for trial in failed:
        reason = f"training failed ({trial.reason})"
        return UnavailableError("run", trial.point[AXIS], reason, "give the same command again to repeat it")
    return None


def _fetch_trained(settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], uri: str, state: Path) -> None:
    """Bring the best weights of finished trials to the state folder."""
    trained = {trial.point[AXIS]: trial for trial in read_trials(uri) if trial.status == "finished"}
    for run in runs:
        trial = trained.get(run.name)
        if trial is None or is_trained(state / run.name):
            continue
        folder, stored = state / run.name, RunFolder(f"{uri}/trials", space.trial(trial.number, trial.point, 1).name)
        if not stored.checkpoints():
            remedy = "restore them, or choose another --state and --scaling.storage"
            raise UnavailableError("scaling.storage", stored.uri, "the run's checkpoints are missing", remedy)
        newest = stored.checkpoints()[0]
        with whole_folder(folder / "checkpoints" / Path(newest.path).name) as part:
            newest.to_directory(part)
            verify_checkpoint(part)
        slim(folder)
        write_config(run_config(space, run), folder)
        write_summary(folder, {"status": "finished", **trial.test})
        if settings.scaling.storage is None:  # it is in the state folder, which must stay small enough to copy
            stored.keep(())
