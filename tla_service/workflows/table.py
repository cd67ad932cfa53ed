"""A table on a Ray cluster: trained as the trials of a grid, as in a sweep, then measured shard by shard."""

import contextlib
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tla_service.cluster.attempts import Budget, Plan, read_trials, seconds_before
from tla_service.cluster.lease import held
from tla_service.cluster.placement import max_concurrent, place
from tla_service.cluster.session import ray_session
from tla_service.cluster.storage import Folder, RunFolder, check_storage
from tla_service.cluster.tasks import TimeIsUpError, Workers
from tla_service.cluster.train import fetch_checkpoint
from tla_service.cluster.trial_log import TrialLines
from tla_service.cluster.tune import run_trials
from tla_service.config.loading import read_settings
from tla_service.errors import UnavailableError
from tla_service.job import stop_on_signal
from tla_service.report.evaluate import evaluate
from tla_service.report.loading import load_models
from tla_service.report.settings import ReportSettings
from tla_service.report.subjects import load_checkpoint_subject
from tla_service.results.local import Say, Track, reproduce
from tla_service.results.runs import (
    AXIS,
    TableRun,
    is_trained,
    record_if_diverged,
    run_config,
    slim,
    table_space,
    write_report_settings,
)
from tla_service.results.settings import ReproduceSettings
from tla_service.training.output import write_config, write_summary
from tla_service.training.reporting import Terminal
from tla_service.tuning.space import Space


def reproduce_on_ray(settings: ReproduceSettings, track: Track | None = None) -> int:
    """Make a table on a cluster; see `reproduce`."""
    with ray_session(settings.scaling, debug=settings.debug, dashboard=True):
        return reproduce(settings, partial(_make, settings), track)


def _make(
    settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], state: Path, say: Say, deadline: float
) -> bool:
    failed = _train(settings, space, runs, state, deadline)
    measured = [run for run in runs if not run.is_trial]
    ready = [run for run in measured if all(is_trained(state / name) for name in (run.name, run.surrogate) if name)]
    workers, terminal = Workers(settings.scaling, deadline), Terminal()
    try:
        for run in ready:
            workers.check_time()
            say(f"{run.name}: evaluation")
            path = write_report_settings(settings, run, state)
            report = read_settings(ReportSettings, ["--config", str(path)])
            models = load_models(report, load_checkpoint_subject)
            evaluate(report, models, lambda: workers, terminal)
            slim(path.parent)
    except TimeIsUpError:
        return False
    if failed is not None:
        raise failed
    return len(ready) == len(measured) and all(is_trained(state / run.name) for run in runs)


def _train(
    settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], state: Path, deadline: float
) -> UnavailableError | None:
    """Train the runs that are missing, and bring their best weights to the state folder; returns a failure."""
    address = f"{settings.scaling.storage or state / 'ray'}/{space.name}"
    check_storage(address)
    storage, terminal = Folder(address), Terminal()
    uri = storage.uri
    with held(storage, terminal.say) as lease:
        placement = place(space.run)
        _fetch_trained(settings, space, runs, uri, state)
        missing = [run for run in runs if not is_trained(state / run.name)]
        if not missing:
            return None
        hours = None
        if deadline < math.inf:  # a sweep counts all attempts
            hours = max(1e-6, seconds_before(uri) + deadline - time.monotonic()) / 3600
        grid = table_space(settings, missing, max_hours=hours)
        concurrent = max_concurrent(space.run.scaling, settings.side_by_side, placement)
        plan = Plan(grid, uri, placement, None, concurrent, grid.epochs(), repeat=True)
        budget = Budget(plan, lease)
        log = contextlib.closing(TrialLines(terminal, state))
        with log as lines, stop_on_signal("stopping the sweep", budget.interrupt):
            run_trials(plan, budget, lines, debug=settings.debug)
        lease.check()
        if budget.error is not None:
            raise budget.error
        _fetch_trained(settings, space, runs, uri, state)
        if budget.interrupted:
            raise KeyboardInterrupt
        left, failures = {run.name: run.is_trial for run in missing if not is_trained(state / run.name)}, []
        for trial in read_trials(uri):
            name = trial.point[AXIS]
            if trial.status != "failed" or name not in left:
                continue
            if not (left[name] and record_if_diverged(state / name, trial.reason)):
                reason = f"training failed ({trial.reason})"
                failures.append(UnavailableError("run", name, reason, "give the same command again to repeat it"))
    return next(iter(failures), None)


def _fetch_trained(settings: ReproduceSettings, space: Space, runs: Sequence[TableRun], uri: str, state: Path) -> None:
    """Bring the best weights of finished trials to the state folder; one without checkpoints is to be trained again."""
    trained = {trial.point[AXIS]: trial for trial in read_trials(uri) if trial.status == "finished"}
    for run in runs:
        trial = trained.get(run.name)
        if trial is None or is_trained(state / run.name):
            continue
        folder, stored = state / run.name, RunFolder(f"{uri}/trials", space.trial(trial.number, trial.point, 1).name)
        newest = next(iter(stored.checkpoints()), None)
        if newest is None:
            continue
        fetch_checkpoint(newest, folder / "checkpoints" / Path(newest.path).name)
        slim(folder)
        write_config(run_config(space, run), folder)
        validation = {f"validation/{name}": value for name, value in trial.best_accuracies.items()}
        clock = {"all": trial.worker_seconds}
        write_summary(folder, {"status": "finished", **trial.test, "validation": validation, "wall_seconds": clock})
        if settings.scaling.storage is None:  # it is in the state folder, which must stay small enough to copy
            stored.keep(())
