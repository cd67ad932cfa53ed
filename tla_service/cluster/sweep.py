"""A sweep on Ray Tune, from the driver's side.

Ray Tune places trials, watches over their processes and ends them. What is tried, what is stopped and what is left to
do after a restart comes from the conductor, whose state is the sweep's journal: Ray's own restore brings finished
trials back with stale metrics and forgets the rungs.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune

from tla_service import registry
from tla_service.cluster.pipeline import Facts, check_before_start, check_split
from tla_service.cluster.session import Placement, check_dashboard, check_storage, place, ray_session
from tla_service.cluster.slots import TRIAL_PROCESS_BYTES, Room, check_room
from tla_service.cluster.sweep_adapters import Decisions, Losses, Suggestions, Watch
from tla_service.cluster.sweep_results import conclude
from tla_service.cluster.sweep_tracking import SweepLog
from tla_service.cluster.sweep_trial import run_trial
from tla_service.config import RunConfig
from tla_service.errors import ConfigError
from tla_service.job import INTERRUPTED
from tla_service.models import build_model
from tla_service.models.classifier import seen_by_triplets
from tla_service.training.output import open_output
from tla_service.training.reporting import Terminal
from tla_service.tuning.conductor import Conductor
from tla_service.tuning.journal import SWEEP_FILE, Journal
from tla_service.tuning.lease import Lease
from tla_service.tuning.report import told_counts
from tla_service.tuning.settings import sweep_yaml
from tla_service.tuning.space import Space

TRIAL_PROCESS_RESTARTS = 3


@dataclass(frozen=True)
class Sweep:
    """A sweep that is about to run.

    Attributes:
        run: The run that is varied, with its number of workers.
        space: What is searched, and how.
        name: The sweep's name.
        storage: Its folder or s3:// prefix.
        output: Local folder for what comes out.
        facts: What the checks found out.
        placement: Workers of a trial.
        room: How many trials there is room for.
    """

    run: RunConfig
    space: Space
    name: str
    storage: str
    output: Path
    facts: Facts
    placement: Placement
    room: Room


def run_sweep(run: RunConfig, space: Space, output: Path, *, resume: bool, debug: bool = False) -> int:
    """Run a sweep, or go on with it, to its end or the end of its budget; then draw and write what came out.

    Args:
        run: The run that is varied.
        space: What is searched, and how.
        output: Folder for the table, the pictures, the winner's configuration, `log.jsonl` and, unless
            `scaling.storage` says otherwise, the sweep's journal and the trials' checkpoints.
        resume: Go on with the sweep of this name, if there is one.
        debug: Show what Ray and its workers log.

    Returns:
        The job's exit code: 0, 1 if no trial succeeded or too many failed, 130 after an interrupt.

    Raises:
        UserError: Something is wrong or missing; found before workers start, as far as it can be.
    """
    name = space.name
    open_output(run, output)
    storage = f"{run.scaling.storage or output / 'ray'}/{name}"
    check_storage(storage)
    journal = Journal(storage)
    run = _known_run(run, space, journal, name, resume=resume)
    registry.check_tracking(run.tracking)
    facts = check_before_start(run)
    # Trials that are stopped early or killed leave their places to Ray Train's cleaner, which needs the dashboard.
    with ray_session(run, debug=debug, dashboard=True):
        check_dashboard()
        run = _with_workers(run)
        placement = place(run)
        check_ends(space, facts, placement.num_workers)
        room = _room(run, space, placement)
        journal.write(SWEEP_FILE, sweep_yaml(run, space.sweep))
        return _conduct(Sweep(run, space, name, storage, output, facts, placement, room), journal, debug=debug)


def check_ends(space: Space, facts: Facts, num_workers: int) -> None:
    """See that batches, pools and networks at the ends of the space can be had from the data.

    Raises:
        ConfigError: One cannot.
    """
    dataset = facts.dataset
    for axis in space.axes:
        networks = {(space.run.model, space.run.loss.triplet_layer)}
        for value in axis.ends:
            found = space.alone(axis, value)
            if found is None:
                continue
            try:
                check_split(found, dataset, num_workers)
                if (found.model, found.loss.triplet_layer) not in networks:
                    networks.add((found.model, found.loss.triplet_layer))
                    model = found.model
                    network = build_model(
                        model.name, len(dataset.class_names), dataset.image_shape, model.normalization
                    )
                    seen_by_triplets(network, found.loss.triplet_layer)
            except ConfigError as error:
                reason = f"{error.subject}={error.value}: {error.reason}"
                raise ConfigError(f"sweep.space.{axis.name}", value, reason, error.remedy) from error


def _known_run(run: RunConfig, space: Space, journal: Journal, name: str, *, resume: bool) -> RunConfig:
    """Compare with the sweep of this name that is there already, if any; returns the run with its number of workers."""
    text = journal.read(SWEEP_FILE)
    if text is None:
        if resume:  # a job that is submitted again and again gives it from the start
            Terminal().say(f"there is no sweep {name} in {journal.storage} yet: it begins")
        return run
    if not resume:
        remedy = "give --resume to go on with it, or choose another --sweep.name"
        raise ConfigError("sweep.name", name, f"there is such a sweep in {journal.storage}", remedy)
    before = yaml.safe_load(text)
    workers = before["scaling"]["num_workers"]
    if run.scaling.num_workers not in ("auto", workers):
        raise ConfigError(
            "scaling.num_workers",
            run.scaling.num_workers,
            f"the sweep began with {workers}, and trials of different numbers do not compare",
            f"use {workers}, or another --sweep.name",
        )
    run_before = RunConfig.model_validate({key: value for key, value in before.items() if key != "sweep"})
    sweep_before = type(space.sweep).model_validate(before["sweep"])
    left_out = space.sweep.NOT_IDENTITY
    same_search = sweep_before.model_dump(exclude=left_out) == space.sweep.model_dump(exclude=left_out)
    if run_before.digest != run.digest or not same_search:
        remedy = f"take the settings of {journal.storage}/{SWEEP_FILE} (--config), or choose another --sweep.name"
        raise ConfigError("sweep.name", name, "is a sweep with other settings", remedy)
    return _workers(run, workers)


def _with_workers(run: RunConfig) -> RunConfig:
    """The run with `auto` workers counted: few a trial keep more trials going, so one on a GPU, else two."""
    if run.scaling.num_workers != "auto":
        return run
    gpus = ray.cluster_resources().get("GPU", 0.0) > 0
    use_gpu = gpus if run.scaling.use_gpu == "auto" else run.scaling.use_gpu
    return _workers(run, 1 if use_gpu else 2)


def _workers(run: RunConfig, number: int) -> RunConfig:
    return run.model_copy(update={"scaling": run.scaling.model_copy(update={"num_workers": number})})


def _room(run: RunConfig, space: Space, placement: Placement) -> Room:
    """Room for trials; checked, unless the cluster is to grow: then at least one waits for what it grows by."""
    grows = run.scaling.wait_seconds > 0
    if not grows:
        check_room([node["Resources"] for node in ray.nodes() if node["Alive"]], placement)
    return Room(placement, space.sweep.max_concurrent, max(1, space.sweep.on_deck) if grows else space.sweep.on_deck)


def _conduct(sweep: Sweep, journal: Journal, *, debug: bool) -> int:
    holder: list[Watch] = []
    lease = Lease(journal, lambda error: holder[0].fail(error) if holder else None)
    placement = sweep.placement
    status: Any = "FAILED"
    parent = sweep.run.model_copy(update={"name": sweep.name})
    log = SweepLog(Terminal(), sweep.output, parent, sweep.storage, sweep.facts.described)
    try:
        conductor = Conductor(
            sweep.space,
            sweep.name,
            journal,
            log,
            num_workers=placement.num_workers,
            gpus_a_trial=placement.num_workers * placement.gpus_per_worker if placement.use_gpu else 0.0,
            seconds_before=lease.seconds_before,
        )
        watch = Watch(conductor, sweep.run.scaling.wait_seconds)
        holder.append(watch)
        log.say(f"sweep {sweep.name}: {', '.join(axis.name for axis in sweep.space.axes)}")
        room = f"{sweep.room.limit()} trials under way at a time, those on deck included"
        log.say(f"{room}; {placement.num_workers} workers each; output in {sweep.output}")
        if conductor.trials:
            log.say(f"going on: {told_counts(conductor.trials)}")
        if not conductor.is_done():
            with _stop_on_signal(watch):
                _tune(sweep, conductor, watch, attempt=lease.attempt, debug=debug)
        if watch.error is not None:
            raise watch.error
        conclude(conductor, sweep.run, sweep.output, log, slots=max(1, sweep.room.slots), attempt=lease.attempt)
        status = "KILLED" if watch.interrupted else "FAILED" if conductor.failed_for else "FINISHED"
    finally:
        log.close(status)
        lease.release()
    if watch.interrupted:
        log.say("stopped; the same command with --resume goes on from the trials' last checkpoints")
        return INTERRUPTED
    return 1 if conductor.failed_for else 0


def _tune(sweep: Sweep, conductor: Conductor, watch: Watch, *, attempt: int, debug: bool) -> None:
    """Let Ray Tune run what the conductor chooses, until that is nothing more."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the journal and MLflow have it all
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours asks the conductor
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables; --debug shows them
    weights = sweep.facts.weights
    trainable = tune.with_parameters(
        run_trial,
        placement=sweep.placement,
        storage=f"{sweep.storage}/trials-ray",
        weights=None if weights is None else dict(weights),
        measure_test=sweep.space.sweep.measure_test,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"memory": TRIAL_PROCESS_BYTES}),
        tune_config=tune.TuneConfig(
            search_alg=Suggestions(conductor, watch, sweep.room),
            scheduler=Decisions(conductor, watch),
            num_samples=-1,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}-{trial.trial_id}",
            trial_name_creator=lambda trial: f"trial-{trial.config['number']:04d}",
        ),
        run_config=tune.RunConfig(
            name=f"tune-{attempt}",  # of its own each time: nothing of it is read again
            storage_path=sweep.storage,
            stop=watch,
            callbacks=[Losses(conductor, watch)],
            failure_config=tune.FailureConfig(max_failures=TRIAL_PROCESS_RESTARTS),
            verbose=2 if debug else 0,
        ),
    )
    tuner.fit()


@contextlib.contextmanager
def _stop_on_signal(watch: Watch) -> Iterator[None]:
    """First SIGINT or SIGTERM: end the sweep in good order; second: KeyboardInterrupt."""

    def handle(_signal: int, _frame: object) -> None:
        if watch.interrupted:
            raise KeyboardInterrupt
        watch.interrupted = True
        os.write(2, b"stopping the sweep; interrupt again to stop at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
