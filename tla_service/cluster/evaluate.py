"""From a model's address to its report: check, measure on Ray, write, log."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tla_service.cluster.evaluation_folder import identity, open_folder, report_folder
from tla_service.cluster.evaluation_models import Models, load_models
from tla_service.cluster.evaluation_text import describe_surrogate, next_step, show
from tla_service.cluster.session import ray_session
from tla_service.cluster.shards import NetworkSource, Slots, find_slots, run_tasks
from tla_service.data import split_validation
from tla_service.environment import code_facts
from tla_service.errors import ConfigError, UserError
from tla_service.evaluation.neighbours import pick_queries
from tla_service.evaluation.outcomes import ShardOutcome, save_outcome
from tla_service.lock import locked_folder
from tla_service.registry.evaluation_log import log_evaluation
from tla_service.registry.subject import Subject
from tla_service.report import findings as fd
from tla_service.report import schema as rp
from tla_service.report.audit_facts import audit_facts, autoattack_warnings
from tla_service.report.figures import Figures, ReportFigure
from tla_service.report.page import method_name, write_page
from tla_service.report.plan import (
    Plan,
    attack_tasks,
    audit_tasks,
    bank_rows,
    check_plan,
    embedding_tasks,
    make_plan,
    protocol,
    query_task,
    single_tasks,
    surrogate_task,
)
from tla_service.report.settings import EvaluateSettings
from tla_service.report.tasks import Task, select
from tla_service.tracking.connection import tracking_uri
from tla_service.training.reporting import Terminal

_SECONDS_BETWEEN_LINES = 5.0


def evaluate_and_report(settings: EvaluateSettings) -> int:
    """Run an evaluation to its end.

    Shards are saved as they come in: the same evaluation, under whatever address of the weights, goes on where it was
    stopped or killed.

    Args:
        settings: What to evaluate, and how.

    Returns:
        The job's exit code, 0.

    Raises:
        UserError: Something is wrong or missing; found before anything is measured, as far as it can be.
    """
    terminal = Terminal()
    uri = tracking_uri(settings.tracking)
    models = load_models(settings, uri)
    subject, dataset = models.subject, models.dataset
    plan = make_plan(settings, dataset.name, subject.norm, subject.epsilon, has_surrogate=models.surrogate is not None)
    check_plan(plan, dataset.image_shape)
    tasks = _tasks(settings, plan, models)
    output = report_folder(settings, models, plan)
    with locked_folder(output, "output"):
        if open_folder(output, identity(settings, models, plan)):
            terminal.say("this evaluation has finished before; choose another --output to make it again")
            # The address may be another one this time.
            report = rp.read_report(output / rp.REPORT_FILE).model_copy(update={"model": subject.facts})
        else:
            terminal.say(f"evaluating {subject.facts.uri} on {dataset.name}, output in {output}")
            report = _evaluate(settings, plan, models, tasks, output, terminal)
        # Also if it has finished before: MLflow may have been away by then.
        tagged = _log(settings, uri, report, _written(output), terminal)
    show(report, output / rp.PAGE_FILE, terminal)
    terminal.say(next_step(report, tagged, settings, output / rp.PAGE_FILE))
    return 0


def _evaluate(
    settings: EvaluateSettings, plan: Plan, models: Models, tasks: Sequence[Task], output: Path, terminal: Terminal
) -> rp.Report:
    """Measure, and write the report."""
    began = time.monotonic()
    subject, dataset = models.subject, models.dataset
    results, slots = _measure(settings, plan, models, tasks, output, terminal)
    set_aside = dataset.gate.numpy()
    published = select(results, tasks, ~set_aside)
    found = {each.key: fd.gather(published, each.key, plan, settings, each.rejector) for each in models.all}
    gate = fd.gather(select(results, tasks, set_aside), subject.key, plan, settings, subject.rejector)
    report = _report(settings, plan, models, found, gate, slots, time.monotonic() - began)
    figures = _draw(settings, plan, models, found, results, output / "figures")
    outcomes = {
        file: replace(results[subject.key, name], gate=set_aside[results[subject.key, name].indices])
        for name, file in (("columns", rp.OUTCOME_FILE), ("autoattack", rp.AUTOATTACK_FILE))
        if (subject.key, name) in results
    }
    _write(report, outcomes, figures, plan, output)
    return report


def _tasks(settings: EvaluateSettings, plan: Plan, models: Models) -> list[Task]:
    """What is measured of every test image, whether it is set aside for the gate or not.

    Raises:
        ConfigError: So few images are taken that all of them are set aside.
    """
    subject, dataset = models.subject, models.dataset
    bank = _bank(settings, models)
    tasks = []
    for each in models.all:
        tasks += attack_tasks(plan, settings, dataset, each.key)
        tasks += embedding_tasks(plan, settings, dataset, each.key, bank)
    tasks += single_tasks(plan, settings, dataset, subject.key)
    for task in tasks:
        if task.split == "test" and dataset.gate[task.rows].all():
            reason = (
                f"{task.name} takes {len(task.rows)} test images, all of which are set aside for the promotion gate"
            )
            raise ConfigError("images", None, reason, "take more images (images.*, data.test_limit)")
    return tasks


def _measure(
    settings: EvaluateSettings, plan: Plan, models: Models, tasks: Sequence[Task], output: Path, terminal: Terminal
) -> tuple[dict[tuple[str, str], Any], Slots]:
    """Run all tasks on Ray: first everything, then the few queries that depend on it."""
    subject, dataset = models.subject, models.dataset
    sources = {each.key: _source(each) for each in models.all}
    surrogate = _source(models.surrogate) if models.surrogate is not None else None
    say = _Now(terminal)
    with ray_session(settings, debug=settings.debug):
        slots = find_slots(settings.scaling)
        terminal.say(f"measuring on {slots}")
        results: dict[tuple[str, str], Any] = {}
        without = ""
        if settings.images.audit and surrogate is None:
            try:
                surrogate, results = _train_surrogate(plan, models, sources, output, slots, terminal)
            except UserError as error:
                without = f"no surrogate was given, and none could be trained ({error})"
                terminal.say(without)
        # The audit first: it is one long shard, and the others fill up the time beside it.
        tasks = [*audit_tasks(plan, settings, dataset, subject.key, without), *tasks]
        results |= run_tasks(tasks, sources, surrogate, dataset, output, slots, say)
        if (subject.key, "natural") in results:
            natural = results[subject.key, "natural"]
            natural = natural.only(~dataset.gate.numpy()[natural.rows])
            rows = natural.rows[pick_queries(natural.embedded, settings.pictures.queries, plan.seed)]
            if len(rows):
                queries = [query_task(plan, subject.key, rows)]
                results |= run_tasks(queries, sources, surrogate, dataset, output, slots, say)
    return results, slots


def _train_surrogate(
    plan: Plan, models: Models, sources: Mapping[str, NetworkSource], output: Path, slots: Slots, terminal: Terminal
) -> tuple[NetworkSource, dict[tuple[str, str], Any]]:
    """Train a surrogate for the audit, or take the one that an earlier attempt has trained.

    Raises:
        UserError: There are no training images, or they are too small.
    """
    dataset, key = models.dataset, models.subject.key
    terminal.say("no --surrogate is given: training a small one for the audit's transfer check")
    task = surrogate_task(plan, dataset, key)
    results = run_tasks([task], sources, None, dataset, output, slots, lambda _: None)
    trained = results[task.key]
    terminal.say(describe_surrogate(trained.facts))
    classes = len(dataset.class_names)
    return NetworkSource(trained.architecture, classes, dataset.image_shape, "default", trained.weights), results


class _Now:
    """Passes progress on, a line every few seconds."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._last = terminal, 0.0

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._terminal.say(text)


def _bank(settings: EvaluateSettings, models: Models) -> Any:
    """Training images that Gaussians are fitted to; the validation split of the training run stays out."""
    labels = models.dataset.train.labels
    config = models.subject.config
    rows = torch.arange(len(labels))
    if config is not None and config.data.name == models.dataset.name:
        rows, _ = split_validation(labels, config.data.validation_fraction, config.seed)
    return bank_rows(rows, labels, settings.images.bank)


def _source(subject: Subject) -> NetworkSource:
    return NetworkSource(
        subject.facts.architecture,
        len(subject.class_names),
        subject.image_shape,
        subject.normalization,
        subject.network.state_dict(),
    )


def _report(
    settings: EvaluateSettings,
    plan: Plan,
    models: Models,
    found: Mapping[str, fd.Findings],
    gate: fd.Findings,
    slots: Slots,
    seconds: float,
) -> rp.Report:
    subject, dataset = models.subject, models.dataset
    own = found[subject.key]
    classes = len(dataset.class_names)
    compared = tuple(
        rp.Compared(
            model=other.facts,
            accuracy=fd.accuracy_facts(fd.accuracies(found[other.key], plan, classes)),
            difference=fd.differences(own, found[other.key], plan),
            detection=fd.detection_facts(found[other.key], plan, settings),
            neighbours=fd.neighbour_facts(found[other.key], plan, settings),
            shift=fd.shift_facts(found[other.key]),
            warnings=autoattack_warnings(found[other.key].autoattack),
        )
        for other in models.others
    )
    return rp.Report(
        model=subject.facts,
        data=rp.DataFacts(
            name=dataset.name,
            images=len(dataset.test),
            fingerprint=dataset.fingerprint,
            class_names=dataset.class_names,
            trained_on=subject.trained_on,
        ),
        threat_model=rp.ThreatModel(norm=plan.norm, epsilon=plan.epsilon),
        accuracy=fd.accuracy_facts(fd.accuracies(own, plan, classes)),
        attacks=fd.attack_facts(plan),
        autoattack=fd.autoattack_facts(own, plan),
        curves=fd.curve_facts(own, plan),
        sparse=fd.sparse_facts(own),
        audit=audit_facts(own.audit, own.autoattack, own.surrogate),
        detection=fd.detection_facts(own, plan, settings),
        neighbours=fd.neighbour_facts(own, plan, settings),
        shift=fd.shift_facts(own),
        compared=compared,
        surrogate=models.surrogate.facts if models.surrogate is not None else None,
        code=code_facts(),
        seed=settings.seed,
        settings=protocol(plan, settings),
        seconds=seconds,
        hardware=str(slots),
        gate=fd.gate_facts(gate, plan, settings, classes, int(dataset.gate.sum())),
    )


def _draw(
    settings: EvaluateSettings,
    plan: Plan,
    models: Models,
    found: Mapping[str, fd.Findings],
    results: Mapping[tuple[str, str], Any],
    folder: Path,
) -> list[ReportFigure]:
    subject = models.subject
    figures = Figures(folder, found[subject.key], plan, models.dataset.class_names)
    figures.accuracy()
    figures.curves()
    figures.detection()
    labels = {each.key: method_name(each.facts.method) for each in models.others}
    figures.shift({labels[key]: found[key] for key in labels}, method_name(subject.facts.method))
    figures.maps(settings, models.dataset.name)
    if (subject.key, "examples") in results:
        figures.queries(results[subject.key, "examples"], models.dataset, settings)
    return figures.drawn


def _write(
    report: rp.Report, outcomes: Mapping[str, ShardOutcome], figures: list[ReportFigure], plan: Plan, output: Path
) -> None:
    """Write the report, the page last: it marks the evaluation as finished."""
    for name, outcome in outcomes.items():
        save_outcome(outcome, output / name)
    rp.write_report(report, output / rp.REPORT_FILE)
    write_page(report, figures, output / rp.PAGE_FILE, same_attacks=plan.is_paper)


def _written(output: Path) -> dict[str, Path]:
    """Files of a report that is finished, by their names in MLflow."""
    names = (rp.REPORT_FILE, rp.OUTCOME_FILE, rp.PAGE_FILE, rp.AUTOATTACK_FILE)
    found = [output / name for name in names] + sorted((output / "figures").glob("*"))
    return {path.relative_to(output).as_posix(): path for path in found if path.is_file()}


def _log(
    settings: EvaluateSettings, uri: str, report: rp.Report, files: Mapping[str, Path], terminal: Terminal
) -> tuple[str, ...]:
    """Log the report, if it is to be; returns the versions that were tagged, as ``NAME/VERSION``."""
    if not settings.log or report.model.run_id is None:
        return ()
    tagged = log_evaluation(uri, report, files)
    terminal.say(f"logged to run {report.model.run_id} at {uri}" + "".join(f", tagged {each}" for each in tagged))
    return tagged
