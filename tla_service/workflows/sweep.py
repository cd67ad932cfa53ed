"""A sweep from configuration to winner: check, search on Ray Tune, write what came out, train the winner over seeds."""

import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

from tla_service.cluster.attempts import Budget, Plan, attempts, read_trials
from tla_service.cluster.lease import Lease, held
from tla_service.cluster.placement import max_concurrent, place, workers_per_trial
from tla_service.cluster.session import ray_session
from tla_service.cluster.storage import Folder, check_storage
from tla_service.cluster.trial_log import RunStatus, TrialLog
from tla_service.cluster.tune import DEFAULT_SAMPLES, run_trials
from tla_service.config import RunConfig
from tla_service.config.loading import load_config_file, to_yaml
from tla_service.config.yaml_files import parse_yaml
from tla_service.data.cache import disk_trouble
from tla_service.errors import ConfigError, UnavailableError, readable, without_credentials
from tla_service.files import locked_folder, write_whole
from tla_service.job import INTERRUPTED, stop_on_signal
from tla_service.models import Architecture
from tla_service.models.classifier import seen_by_triplets
from tla_service.runtime import WorkerContext
from tla_service.tracking.connection import check_tracking
from tla_service.training.checkpoint import check_facts
from tla_service.training.network import check_network
from tla_service.training.output import open_output
from tla_service.training.precheck import split_and_check
from tla_service.training.pretrained import check_fine_tuning
from tla_service.training.reporting import Terminal
from tla_service.tuning.axes import shown
from tla_service.tuning.figures import draw_all
from tla_service.tuning.settings import sweep_yaml
from tla_service.tuning.space import Point, Space
from tla_service.tuning.trials import Trial, as_csv, counts, table, winner
from tla_service.workflows.run import Facts, check_before_start, check_disks
from tla_service.workflows.train import train_and_register

SETTINGS, WINNER, SUMMARY, SEEDS = "sweep.yaml", "best.yaml", "sweep.json", "winner.json"
BEGAN_WITH = "began_with.json"


def run_sweep(run: RunConfig, space: Space, output: Path, *, resume: bool, debug: bool = False) -> int:
    """Run or continue a sweep until it is done or its budget is used; then write and track what came out.

    Returns the job's exit code: 0; 1 if every trial failed, or too many in a row; 130 after an interrupt.
    """
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked_folder(output, "output"))
        open_output(run, output)
        address = f"{run.scaling.storage or output / 'ray'}/{space.name}"
        check_storage(address)
        storage, lease = Folder(address), Lease()
        if run.scaling.storage is not None:  # else it is in the output folder, which is locked
            lease = locks.enter_context(held(storage, Terminal().say))
        run = _compare(run, space, storage, resume=resume)
        check_tracking(run.tracking)
        facts = check_before_start(run)
        epochs = space.epochs(facts.steps_per_epoch)
        _check_began_with(run, storage, facts.began_with)
        wanted = space.sweep.num_samples
        trials = len(space.grid()[:wanted]) if space.sweep.searcher == "grid" else wanted or DEFAULT_SAMPLES
        check_disks(run, output, f"{storage.uri}/trials", facts.checkpoint_bytes, trials)
        with ray_session(run.scaling, debug=debug, dashboard=True):
            run = _workers(run, workers_per_trial(run.scaling))
            placement = place(run)
            _check_ends(space, facts, placement.num_workers)
            most = max_concurrent(run.scaling, space.sweep.max_concurrent, placement)
            plan = Plan(space, storage.uri, placement, facts.weights, most, epochs, code=facts.architecture.code)
            storage.write(SETTINGS, sweep_yaml(run, space.sweep).encode())
            storage.write(BEGAN_WITH, json.dumps(facts.began_with).encode())
            return _search(plan, run, facts, output, lease, debug=debug)


def _check_began_with(run: RunConfig, storage: Folder, now: dict[str, Any]) -> None:
    """Trials that continue a sweep train what it began with, on the same images."""
    text = storage.read(BEGAN_WITH)
    if text is None:
        return
    with readable("sweep.name", f"{storage.uri}/{BEGAN_WITH}", "choose another --sweep.name"):
        before = dict(json.loads(text))
    check_facts(before, now, run, "sweep", "--sweep.name")
    if before.get("pretrained_sha256") != now.get("pretrained_sha256"):
        reason, remedy = "its weights are not those that this sweep began with", "name them by version or file"
        raise ConfigError("model.pretrained", run.model.pretrained, reason, f"{remedy}, or choose another --sweep.name")


def _check_ends(space: Space, facts: Facts, num_workers: int) -> None:
    """Check that the data has enough images for batches, pools and networks at the ends of the space."""
    dataset, networks = facts.dataset, {(space.run.model, space.run.loss.triplet_layer)}
    own = facts.architecture.build(len(dataset.class_names), dataset.image_shape)
    for axis, value in space.ends():
        found = space.alone(axis, value)
        if found is None:
            continue
        model, layer = found.model, found.loss.triplet_layer
        if model != space.run.model and (model.pretrained or space.run.model.pretrained):
            reason = "all trials start from the same pretrained weights, which fit one network"
            raise ConfigError(f"sweep.space.{axis.name}", value, reason, "start one sweep per network")
        architecture = Architecture.of(model, facts.architecture.code)
        try:
            split_and_check(found, dataset, WorkerContext(world_size=num_workers), architecture)
            check_fine_tuning(found, own)  # which all trials that start from weights have
            if (model, layer) not in networks:
                networks.add((model, layer))
                network = architecture.build(len(dataset.class_names), dataset.image_shape)
                check_network(found, architecture, network, dataset)
                seen_by_triplets(network, layer)
        except ConfigError as error:
            reason = f"{error.subject}={error.value}: {error.reason}"
            raise ConfigError(f"sweep.space.{axis.name}", value, reason, error.remedy) from error


def _compare(run: RunConfig, space: Space, storage: Folder, *, resume: bool) -> RunConfig:
    """Compare with an existing sweep of this name, if any; returns the run with its number of workers."""
    name = space.name
    if storage.read("driver.json") is not None:
        reason = f"was begun by an earlier version ({storage.uri}), whose sweeps cannot be resumed"
        raise ConfigError("sweep.name", name, reason, "choose another --sweep.name; its best.yaml still loads")
    text = storage.read(SETTINGS)
    if text is None:
        if resume:  # a job that a cluster submits again and again gives it from the start
            Terminal().say(f"there is no sweep {name} in {storage.uri} yet; starting it")
        return run
    if not resume:
        remedy = "give --resume to continue it, or choose another --sweep.name"
        raise ConfigError("sweep.name", name, f"this sweep exists in {storage.uri}", remedy)
    before = parse_yaml(text.decode(), "sweep.name", name)
    workers = before["scaling"]["num_workers"]
    if run.scaling.num_workers not in ("auto", workers):
        reason = f"the sweep was started with {workers}, and trials with different numbers of workers do not compare"
        remedy = f"use {workers}, or another --sweep.name"
        raise ConfigError("scaling.num_workers", run.scaling.num_workers, reason, remedy)
    run_before = RunConfig.model_validate({key: value for key, value in before.items() if key != "sweep"})
    sweep_before = type(space.sweep).model_validate(before["sweep"])
    left_out = space.sweep.NOT_IDENTITY
    same_search = sweep_before.model_dump(exclude=left_out) == space.sweep.model_dump(exclude=left_out)
    # Of what shapes no weights, the test counts where trials are measured by it.
    tests = [(each.evaluation.test, each.data.test_limit) for each in (run_before, run)]
    same_test = tests[0] == tests[1] or not space.sweep.measure_test
    if run_before.digest != run.digest or not (same_search and same_test):
        remedy = f"use the settings in {storage.uri}/{SETTINGS} (--config), or choose another --sweep.name"
        raise ConfigError("sweep.name", name, "this sweep has other settings", remedy)
    return _workers(run, workers)


def _workers(run: RunConfig, number: int) -> RunConfig:
    return run.model_copy(update={"scaling": run.scaling.model_copy(update={"num_workers": number})})


def _search(plan: Plan, run: RunConfig, facts: Facts, output: Path, lease: Lease, *, debug: bool) -> int:
    space, budget = plan.space, Budget(plan, lease)
    lease.check()
    log = TrialLog(Terminal(), output, run, plan, facts.described)
    status: RunStatus = "FAILED"
    try:
        log.say(f"sweep {space.name}: {', '.join(axis.name for axis in space.axes)}")
        log.say(f"up to {plan.max_concurrent} trials in parallel, {plan.placement.num_workers} workers each")
        for note in (f"output in {output}", *facts.notes):
            log.say(note)
        before = read_trials(plan.storage)
        if before:
            log.say(f"continuing: {counts(before)}")
        with stop_on_signal("stopping the sweep", budget.interrupt):
            run_trials(plan, budget, log, debug=debug)
        lease.check()
        if budget.error is not None:
            raise budget.error
        trials = read_trials(plan.storage)
        _conclude(plan, budget, trials, run, output, log)
        failed = bool(budget.gave_up) or (bool(trials) and all(trial.status == "failed" for trial in trials))
        status = "KILLED" if budget.interrupted else "FAILED" if failed else "FINISHED"
    finally:
        log.close(status)
    if budget.interrupted:
        log.say("stopped; the same command with --resume continues from the trials' last checkpoints")
        return INTERRUPTED
    return 1 if failed else 0


def _conclude(plan: Plan, budget: Budget, trials: list[Trial], run: RunConfig, output: Path, log: TrialLog) -> None:
    """Write, plot, track and show the results so far."""
    space = plan.space
    rows, best = table(trials, space), winner(trials, space.objectives[0])
    summary = {
        "name": space.name,
        "trials": counts(trials),
        "ended_because": budget.used_up,
        "winner": None if best is None else next(row for row in rows if row["trial"] == best.number),
        "wall_seconds": round(budget.wall_seconds, 1),
        "gpu_hours": round(budget.gpu_hours, 4),
        "run_id": log.run_id,
        "tracking_uri": without_credentials(log.uri),
    }
    written = {
        "trials.csv": as_csv(rows),
        "trials.json": json.dumps([trial.as_dict() for trial in trials], indent=1),
        SUMMARY: json.dumps(summary, indent=2),
    }
    if best is not None:
        written[WINNER] = to_yaml(_winner_run(space, best.point, run.scaling.bounds(auto=1)[0]))
    with disk_trouble("output", output, "make room there, and start it again"):
        for name, text in written.items():
            write_whole(output / name, text)
    files = {name: output / name for name in written}
    metrics = {} if best is None else {f"best/{name}": value for name, value in best.best_accuracies.items()}
    figures = draw_all(trials, space, output / "figures")
    log.store(files | {f"figures/{path.name}": path for path in figures}, metrics, len(attempts(plan.storage)))
    log.say("")
    log.say(counts(trials) + (f"; {budget.used_up}" if budget.used_up else ""))
    if best is not None:
        log.say(f"best: trial {best.number}, {shown(best.point)}")
        for name, value in best.best_accuracies.items():
            log.say(f"  validation {name.replace('_', ' '):<15} {value:7.2%}")
        log.say(f"configuration {output / WINNER}  (train it with train_tla.py --config)")
    log.say(f"table         {output / 'trials.csv'}")
    log.say(f"plots         {output / 'figures'}")
    log.say(f"tracking      {log.uri}  run {log.run_id}")


def _winner_run(space: Space, point: Point, num_workers: int) -> RunConfig:
    return _workers(space.apply(point, full_length=True).model_copy(update={"name": ""}), num_workers)


def train_winner(space: Space, output: Path, num_seeds: int, *, debug: bool = False) -> int:
    """Train, evaluate and register the winner once per seed, unless it has finished before.

    Seeds are counted from the run's own. Returns the exit code of the first run that did not finish, or 0.
    """
    if not (output / WINNER).exists():
        raise UnavailableError("then_train", num_seeds, "the sweep has no winner", "see its trials.csv")
    found_by = json.loads((output / SUMMARY).read_text())
    point = {axis.name: found_by["winner"][axis.name] for axis in space.axes}
    # Of the file only the number of workers: addresses in it have lost their credentials.
    config = _winner_run(space, point, load_config_file(output / WINNER).scaling.bounds(auto=1)[0])
    tags, terminal, summaries = {"mlflow.parentRunId": found_by["run_id"]}, Terminal(), []
    for seed in range(config.seed, config.seed + num_seeds):
        terminal.say(f"\nthe winner, seed {seed}")
        # A sweep that is enlarged may find another winner.
        folder = output / "winner" / config.digest / f"seed-{seed}"
        tracking = config.tracking.model_copy(update={"tags": config.tracking.tags | tags})
        code = train_and_register(config.model_copy(update={"seed": seed, "tracking": tracking}), folder, debug=debug)
        if code != 0:
            return code
        summaries.append(json.loads((folder / "summary.json").read_text()))
    values = {"clean_accuracy": [summary["clean_accuracy"] for summary in summaries]}
    for name in summaries[0]["robust_accuracy"]:
        values[f"robust_accuracy/{name}"] = [summary["robust_accuracy"][name] for summary in summaries]
    found: dict[str, Any] = {}
    for name, each in values.items():
        deviation = statistics.stdev(each) if num_seeds > 1 else None
        found[name] = {"mean": statistics.mean(each), "standard_deviation": deviation, "values": each}
    models = [summary["model_uri"] for summary in summaries]
    with disk_trouble("output", output, "make room there, and start it again"):
        write_whole(output / SEEDS, json.dumps({"seeds": num_seeds, "test": found, "models": models}, indent=2))
    terminal.say(f"\nthe winner on the test set, {num_seeds} seeds:")
    for name, each in found.items():
        spread = f" ± {each['standard_deviation']:.2%}" if num_seeds > 1 else ""
        terminal.say(f"  {name:<28} {each['mean']:7.2%}{spread}")
    return 0
