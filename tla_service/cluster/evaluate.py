"""From a model's address to its report: check, measure on Ray, write, log."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tla_service import registry
from tla_service.cluster.evaluation_models import Models, identity, load_models
from tla_service.cluster.session import ray_session
from tla_service.cluster.shards import NetworkSource, Slots, find_slots, run_tasks
from tla_service.data import split_validation
from tla_service.errors import ConfigError, UnavailableError
from tla_service.evaluation.neighbours import pick_queries
from tla_service.evaluation.outcomes import ShardOutcome, save_outcome
from tla_service.registry.subject import Subject
from tla_service.report import findings as fd
from tla_service.report import schema as rp
from tla_service.report.figures import Figures, ReportFigure
from tla_service.report.page import method_name, percent, split_sentence, write_page
from tla_service.report.plan import (
    Plan,
    attack_tasks,
    bank_rows,
    check_plan,
    embedding_tasks,
    make_plan,
    query_task,
    single_tasks,
)
from tla_service.report.settings import EvaluateSettings
from tla_service.report.tasks import Task, select
from tla_service.training.reporting import Terminal

_IDENTITY = "evaluation.json"
_SECONDS_BETWEEN_LINES = 5.0


def evaluate_and_report(settings: EvaluateSettings) -> int:
    """Run an evaluation to its end.

    Shards are saved as they come in: the same command goes on where it was stopped or killed.

    Args:
        settings: What to evaluate, and how.

    Returns:
        The job's exit code, 0.

    Raises:
        UserError: Something is wrong or missing; found before anything is measured, as far as it can be.
    """
    began = time.monotonic()
    terminal = Terminal()
    uri = registry.tracking_uri(settings.tracking)
    models = load_models(settings, uri)
    subject, dataset = models.subject, models.dataset
    plan = make_plan(settings, dataset.name, subject.norm, subject.epsilon, has_surrogate=models.surrogate is not None)
    check_plan(plan, dataset.image_shape)
    tasks = _tasks(settings, plan, models)
    output = (settings.output or Path("reports") / _folder_name(subject, plan)).expanduser().absolute()
    finished = _open_folder(output, identity(settings, models))
    if finished:
        terminal.say("this evaluation has finished before; choose another --output to make it again")
        report = rp.read_report(output / rp.REPORT_FILE)
        # Again: the first time MLflow may have been away by then.
        _log(settings, uri, report, _written(output), terminal)
        _show(report, output, terminal)
        return 0
    terminal.say(f"evaluating {subject.facts.uri} on {dataset.name}, output in {output}")
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
    _log(settings, uri, report, _written(output), terminal)
    _show(report, output, terminal)
    return 0


def _folder_name(subject: Subject, plan: Plan) -> str:
    """Default folder of a report: threat models that the model was not trained for have their own."""
    threat = rp.ThreatModel(norm=plan.norm, epsilon=plan.epsilon)
    trained_for = rp.ThreatModel(norm=subject.norm, epsilon=subject.epsilon)
    return subject.key if threat.slug == trained_for.slug else f"{subject.key}-{threat.slug}"


def _open_folder(output: Path, mine: Mapping[str, Any]) -> bool:
    """Claim the folder of a report; answers whether this very evaluation has finished there.

    Raises:
        ConfigError: It holds another evaluation, or other files.
        UnavailableError: It cannot be written.
    """
    mark = output / _IDENTITY
    try:
        if output.exists() and not mark.is_file() and any(output.iterdir()):
            raise ConfigError("output", output, "holds other files", "choose another --output")
        if mark.is_file() and json.loads(mark.read_text()) != mine:
            reason = "holds a report of other weights, data or settings"
            raise ConfigError("output", output, reason, "choose another --output, or delete it")
        output.mkdir(parents=True, exist_ok=True)
        partial = mark.with_name(f".{mark.name}")
        partial.write_text(json.dumps(mine, indent=1))
        partial.replace(mark)
    except (OSError, ValueError) as error:
        reason = f"cannot be written ({' '.join(str(error).split())})"
        raise UnavailableError("output", output, reason, "choose another --output") from error
    return (output / rp.PAGE_FILE).is_file()


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
        results = run_tasks(tasks, sources, surrogate, dataset, output, slots, say)
        if (subject.key, "natural") in results:
            natural = results[subject.key, "natural"]
            natural = natural.only(~dataset.gate.numpy()[natural.rows])
            rows = natural.rows[pick_queries(natural.embedded, settings.pictures.queries, plan.seed)]
            if len(rows):
                queries = [query_task(plan, subject.key, rows)]
                results |= run_tasks(queries, sources, surrogate, dataset, output, slots, say)
    return results, slots


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
        audit=rp.AuditFacts.model_validate(own.audit) if own.audit is not None else None,
        detection=fd.detection_facts(own, plan, settings),
        neighbours=fd.neighbour_facts(own, plan, settings),
        shift=fd.shift_facts(own),
        compared=compared,
        surrogate=models.surrogate.facts if models.surrogate is not None else None,
        code=registry.code_facts(),
        seed=settings.seed,
        settings=settings.digest,
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
) -> None:
    if settings.log and report.model.run_id is not None:
        tagged = registry.log_evaluation(uri, report, files)
        terminal.say(f"logged to run {report.model.run_id} at {uri}" + "".join(f", tagged {each}" for each in tagged))


def _show(report: rp.Report, output: Path, terminal: Terminal) -> None:
    """Tell people the figures, and where everything is."""
    terminal.say("")
    if report.gate is not None:
        terminal.say(split_sentence(report))
    for name, found in report.accuracy.items():
        terminal.say(
            f"{name:<18} {percent(found.estimate, 2):>7} %   95%: {percent(found.low)} to {percent(found.high)}"
        )
    if report.detection is not None:
        terminal.say(f"{'detection AUC':<18} {percent(report.detection.auc, 2):>7} %")
    if report.audit is not None:
        failed = ", ".join(check.name for check in report.audit.checks if not check.passed)
        terminal.say("audit: trusted" if report.audit.trusted else f"audit: NOT trusted, fails: {failed}")
    terminal.say(f"report  {output / rp.PAGE_FILE}")
