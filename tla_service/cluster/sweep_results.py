"""The end of a sweep: the winner's configuration, table, pictures and costs, in the output folder and in MLflow."""

import json
from pathlib import Path
from typing import Any

from tla_service.cluster.sweep_tracking import SweepLog
from tla_service.config import RunConfig
from tla_service.config_loading import to_yaml
from tla_service.tuning.axes import shown
from tla_service.tuning.conductor import Conductor
from tla_service.tuning.figures import draw_all
from tla_service.tuning.report import Overhead, as_csv, overhead, table, told_counts
from tla_service.tuning.trial import Trial, winner

WINNER, SUMMARY = "best.yaml", "sweep.json"


def conclude(
    conductor: Conductor, run: RunConfig, output: Path, log: SweepLog, *, slots: int, attempt: int
) -> dict[str, Any]:
    """Write, draw, track and tell what came out, so far.

    Args:
        conductor: The sweep.
        run: The run that was varied, with its number of workers.
        output: Folder for the files.
        log: Where to show and track.
        slots: Trials at a time.
        attempt: Which attempt at the sweep this is: the step of its figures in MLflow.

    Returns:
        What `sweep.json` holds.
    """
    space, trials = conductor.space, conductor.trials
    log.drain()
    rows = table(trials, space)
    best = winner(trials, space.sweep.objectives[0])
    costs = overhead(trials, slots, conductor.began)
    summary = {
        "name": conductor.name,
        "trials": told_counts(trials),
        "ended_because": conductor.halted,
        "winner": None if best is None else rows[best.number],
        "wall_seconds": round(conductor.wall_seconds, 1),
        "gpu_hours": round(conductor.gpu_hours, 4),
        "overhead": None if costs is None else costs.as_dict(),
        "run_id": log.run_id,
        "tracking_uri": log.uri,
    }
    (output / "trials.csv").write_text(as_csv(rows))
    (output / "trials.json").write_text(json.dumps([trial.as_dict() for trial in trials], indent=1))
    (output / SUMMARY).write_text(json.dumps(summary, indent=2))
    files = {name: output / name for name in ("trials.csv", "trials.json", SUMMARY)}
    if best is not None:
        (output / WINNER).write_text(to_yaml(winning_run(conductor, best, run)))
        files[WINNER] = output / WINNER
    files |= {f"figures/{path.name}": path for path in draw_all(trials, space, output / "figures")}
    metrics = {} if costs is None else {f"sweep/{name}": value for name, value in costs.as_dict().items()}
    if best is not None:
        metrics |= {
            f"best/{name}": value for name, value in (best.best() or {}).items() if name.startswith("validation/")
        }
    log.store(files, metrics, attempt)
    _tell(conductor, best, costs, output, log)
    return summary


def winning_run(conductor: Conductor, best: Trial, run: RunConfig) -> RunConfig:
    """The winner's run at full length, named by what it is, with the number of workers it was tried with."""
    found = conductor.space.apply(best.point, full_length=True)
    scaling = found.scaling.model_copy(update={"num_workers": run.scaling.num_workers})
    return found.model_copy(update={"name": "", "scaling": scaling})


def _tell(conductor: Conductor, best: Trial | None, costs: Overhead | None, output: Path, log: SweepLog) -> None:
    log.say("")
    log.say(told_counts(conductor.trials) + (f"; {conductor.halted}" if conductor.halted else ""))
    if best is not None:
        log.say(f"best: trial {best.number}, {shown(best.point)}")
        for name in ("robust_accuracy", "clean_accuracy"):
            log.say(f"  validation {name.replace('_', ' ')} {best.value(name):7.2%}")
        log.say(f"its configuration: {output / WINNER}  (train_tla.py --config takes it)")
    if costs is not None:
        log.say(
            f"of {costs.slots} places x {costs.wall_seconds:.0f} s, {costs.busy_share:.0%} were spent training; "
            f"a trial takes {costs.start_seconds:.1f} s to start and {costs.end_seconds:.1f} s to end, which leaves "
            f"{costs.busy_share_of_five_minutes:.0%} of trials of 5 minutes"
        )
    log.say(f"table    {output / 'trials.csv'}")
    log.say(f"pictures {output / 'figures'}")
    log.say(f"tracking {log.uri}  run {log.run_id}")
