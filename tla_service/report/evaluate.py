"""From models to a report: check, measure, write."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tla_service.data import split_validation
from tla_service.errors import ConfigError, UserError
from tla_service.evaluation.embedding import EmbeddedImages
from tla_service.evaluation.neighbours import pick_queries
from tla_service.evaluation.outcomes import IntArray, ShardOutcome, save_outcome
from tla_service.evaluation.surrogate import TrainedSurrogate
from tla_service.files import locked_folder
from tla_service.job import code_facts
from tla_service.models import build_model
from tla_service.report import findings as fd
from tla_service.report import schema as rp
from tla_service.report.figures import Figures
from tla_service.report.folder import identity, open_folder, report_folder
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
from tla_service.report.settings import ReportSettings
from tla_service.report.subjects import Models
from tla_service.report.tasks import Inputs, Measurer, Results, Task, run_tasks, select
from tla_service.report.text import describe_surrogate
from tla_service.training.reporting import Terminal

_SECONDS_BETWEEN_LINES = 5.0


def evaluate(
    settings: ReportSettings,
    models: Models,
    workers: Callable[[], AbstractContextManager[Measurer]],
    terminal: Terminal,
) -> tuple[rp.Report, Path]:
    """Evaluate models and write the report.

    Shards are saved as they come in: the same evaluation, under whatever address of the weights, resumes where it was
    stopped or killed.

    Args:
        settings: What to evaluate, and how.
        models: Loaded models and data.
        workers: Starts what measures, and ends it; called once everything is checked.
        terminal: Progress goes there.

    Returns:
        The report, and the folder it is in.

    Raises:
        UserError: Something is wrong or missing; found before anything is measured, as far as it can be.
    """
    subject, dataset = models.subject, models.dataset
    threat = subject.threat_model
    plan = make_plan(settings, dataset.name, threat.norm, threat.epsilon, has_surrogate=models.surrogate is not None)
    check_plan(plan, dataset.image_shape)
    output = report_folder(settings, models, plan)
    evaluation = _Evaluation(settings, plan, models, output, terminal)
    tasks = evaluation.tasks()
    with locked_folder(output, "output"):
        if open_folder(output, identity(settings, models, plan), page=settings.page):
            terminal.say("this evaluation has finished before; choose another --output to make it again")
            # The address may be another one this time.
            return rp.read_report(output / rp.REPORT_FILE).model_copy(update={"model": subject.facts}), output
        terminal.say(f"evaluating {subject.facts.uri} on {dataset.name}, output in {output}")
        began = time.monotonic()
        results, hardware = evaluation.measure(tasks, workers)
        set_aside = dataset.gate.numpy()
        published = select(results, tasks, ~set_aside)
        found = {each.key: fd.gather(published, each.key, plan, settings, each.rejector) for each in models.all}
        gate = fd.gather(select(results, tasks, set_aside), subject.key, plan, settings, subject.rejector)
        report = evaluation.report(found, gate, hardware, time.monotonic() - began)
        for name, file in (("columns", rp.OUTCOME_FILE), ("autoattack", rp.AUTOATTACK_FILE)):
            outcome: ShardOutcome | None = results.get((subject.key, name))
            if outcome is not None:
                save_outcome(replace(outcome, gate=set_aside[outcome.indices]), output / file)
        rp.write_report(report, output / rp.REPORT_FILE)
        if settings.page:
            evaluation.draw(found, results.get((subject.key, "examples")), report)
    return report, output


@dataclass(frozen=True)
class _Evaluation:
    """The steps of an evaluation."""

    settings: ReportSettings
    plan: Plan
    models: Models
    output: Path
    terminal: Terminal

    def tasks(self) -> list[Task]:
        """What is measured of every test image, whether it is set aside for the gate or not.

        Raises:
            ConfigError: So few images are taken that all of them are set aside.
        """
        plan, settings, models = self.plan, self.settings, self.models
        subject, dataset = models.subject, models.dataset
        bank = self._bank()
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

    def measure(
        self, tasks: Sequence[Task], workers: Callable[[], AbstractContextManager[Measurer]]
    ) -> tuple[Results, str]:
        """Run all tasks: first everything, then the few queries that depend on it. Also what they ran on."""
        plan, settings, models, output = self.plan, self.settings, self.models, self.output
        subject, dataset = models.subject, models.dataset
        surrogate = models.surrogate.network if models.surrogate is not None else None
        inputs = Inputs({each.key: each.network for each in models.all}, surrogate, dataset)
        say = _Now(self.terminal)
        with workers() as measure:
            self.terminal.say(f"measuring on {measure}")
            results: Results = {}
            without = ""
            if settings.images.audit and surrogate is None:
                self.terminal.say("no --surrogate is given: training a small one for the audit's transfer check")
                try:
                    task = surrogate_task(plan, dataset, subject.key)
                    results |= run_tasks([task], inputs, output, measure, lambda _: None)
                    inputs = inputs._replace(surrogate=_built(results[task.key], models))
                    self.terminal.say(describe_surrogate(results[task.key].facts))
                except UserError as error:
                    without = f"no surrogate was given, and none could be trained ({error})"
                    self.terminal.say(without)
            # The audit first: it is one long shard, and other workers measure the rest in the meantime.
            tasks = [*audit_tasks(plan, settings, dataset, subject.key, without), *tasks]
            results |= run_tasks(tasks, inputs, output, measure, say)
            if settings.page and (subject.key, "natural") in results:
                natural = results[subject.key, "natural"]
                natural = natural.only(~dataset.gate.numpy()[natural.rows])
                rows = natural.rows[pick_queries(natural.embedded, settings.pictures.queries, plan.seed)]
                if len(rows):
                    results |= run_tasks([query_task(plan, subject.key, rows)], inputs, output, measure, say)
        return results, str(measure)

    def _bank(self) -> IntArray:
        """Training images that Gaussians are fitted to; the validation split of the training run stays out."""
        labels = self.models.dataset.train.labels
        config = self.models.subject.config
        rows = torch.arange(len(labels))
        if config is not None and config.data.name == self.models.dataset.name:
            rows, _ = split_validation(labels, config.data.validation_fraction, config.seed)
        return bank_rows(rows, labels, self.settings.images.bank)

    def report(self, found: Mapping[str, fd.Findings], gate: fd.Findings, hardware: str, seconds: float) -> rp.Report:
        """Put the findings together."""
        plan, settings, models = self.plan, self.settings, self.models
        subject, dataset = models.subject, models.dataset
        own = found[subject.key]
        classes = len(dataset.class_names)

        def measured(each: fd.Findings) -> dict[str, Any]:
            """What is reported of every model."""
            return {
                "accuracy": fd.accuracies(each, plan, classes),
                "detection": each.detection,
                "neighbours": fd.neighbours(each, plan, settings),
                "shift": tuple(ratios.at(epsilon) for epsilon, ratios in each.shift.items()),
            }

        compared = tuple(
            rp.Compared(
                model=other.facts,
                difference=fd.differences(own, found[other.key], plan),
                warnings=fd.autoattack_warnings(found[other.key].autoattack),
                **measured(found[other.key]),
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
            attacks=fd.attack_facts(plan),
            autoattack=fd.autoattack_facts(own, plan),
            curves=own.curves,
            sparse=own.norms,
            audit=own.audit,
            compared=compared,
            surrogate=models.surrogate.facts if models.surrogate is not None else None,
            code=code_facts(),
            seed=settings.seed,
            settings=protocol(plan, settings),
            seconds=seconds,
            hardware=hardware,
            gate=rp.GateFacts(
                images=int(dataset.gate.sum()), accuracy=fd.accuracies(gate, plan, classes), detection=gate.detection
            ),
            **measured(own),
        )

    def draw(self, found: Mapping[str, fd.Findings], examples: EmbeddedImages | None, report: rp.Report) -> None:
        """Draw the figures and write the page, last: it marks the evaluation as finished."""
        plan, models = self.plan, self.models
        subject = models.subject
        figures = Figures(self.output / "figures", found[subject.key], plan, models.dataset.class_names)
        figures.accuracy()
        figures.curves()
        figures.detection()
        labels = {each.key: method_name(each.facts.method) for each in models.others}
        figures.shift({labels[key]: found[key] for key in labels}, method_name(subject.facts.method))
        figures.maps(self.settings, models.dataset.name)
        if examples is not None:
            figures.queries(examples, models.dataset, self.settings)
        write_page(report, figures.drawn, self.output / rp.PAGE_FILE, same_attacks=plan.is_paper)


def _built(trained: TrainedSurrogate, models: Models) -> nn.Module:
    network = build_model(trained.facts.architecture, len(models.dataset.class_names), models.dataset.image_shape)
    network.load_state_dict(trained.weights)
    return network.eval()


class _Now:
    """Passes progress on, a line every few seconds."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._last = terminal, 0.0

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._terminal.say(text)
