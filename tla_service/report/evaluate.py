"""From models to a report: check, measure, write."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tla_service.data import split_training
from tla_service.errors import ConfigError, UnavailableError, UserError, one_line
from tla_service.evaluation import results as rs
from tla_service.evaluation.certified import ROW, Certificates
from tla_service.evaluation.embedding import EmbeddedImages
from tla_service.evaluation.geometry import pick_queries
from tla_service.evaluation.shards import ShardOutcome, save_arrays, save_outcome
from tla_service.evaluation.surrogate import ARCHITECTURE, TrainedSurrogate
from tla_service.files import LOCK_FILE, locked_folder, write_whole
from tla_service.job import code_facts
from tla_service.models import build_model
from tla_service.report import evidence as ev
from tla_service.report import findings as fd
from tla_service.report import plan as pl
from tla_service.report import schema as rp
from tla_service.report.figures import Figures
from tla_service.report.page import describe_natural, describe_surrogate, method_name, write_page
from tla_service.report.relatives import Kin
from tla_service.report.settings import ReportSettings
from tla_service.report.subjects import Models, Subject
from tla_service.report.tasks import Inputs, Measurer, Results, Task, run_tasks, select
from tla_service.training.reporting import Terminal

_IDENTITY = "evaluation.json"
_SECONDS_BETWEEN_LINES = 5.0


def evaluate(
    settings: ReportSettings,
    models: Models,
    workers: Callable[[], AbstractContextManager[Measurer]],
    terminal: Terminal,
) -> tuple[rp.Report, Path]:
    """Evaluate models and write the report; returns it, and the folder it is in.

    Shards are saved as they come in: the same evaluation, under whatever address of the weights, resumes where it was
    stopped or killed. `workers` starts what measures once everything is checked, and ends it. UserError if something is
    wrong or missing, found before anything is measured as far as it can be.
    """
    subject, dataset = models.subject, models.dataset
    threat = subject.threat_model
    plan = pl.make_plan(settings, dataset.name, threat.norm, threat.epsilon, has_surrogate=models.surrogate is not None)
    pl.check_plan(plan, dataset.image_shape)
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
        results, tasks, hardware = evaluation.measure(tasks, workers)
        set_aside = dataset.gate.numpy()
        published = select(results, tasks, ~set_aside)
        found = {each.key: fd.gather(published, each.key, plan, settings, each.rejector) for each in models.all}
        gate = fd.gather(select(results, tasks, set_aside), subject.key, plan, settings, subject.rejector)
        report = evaluation.report(found, gate, hardware, time.monotonic() - began)
        measured: dict[str, ShardOutcome | None] = {
            rp.OUTCOME_FILE: results.get((subject.key, "columns")),
            rp.AUTOATTACK_FILE: results.get((subject.key, "autoattack")),
            rp.TRANSFER_FILE: fd.joined([results[task.key] for task in evaluation.transferred]),
        }
        outcomes: dict[str, ShardOutcome] = {}
        for file, outcome in measured.items():
            if outcome is not None:
                outcomes[file] = replace(outcome, gate=set_aside[outcome.indices])
                save_outcome(replace(outcomes[file], per_image={}), output / file)
        certificates: Certificates | None = results.get((subject.key, "certified"))
        if certificates is not None:
            save_arrays({name: certificates[name] for name in ROW.names or ()}, output / rp.CERTIFIED_FILE)
        report = evaluation.write_evidence(report, outcomes)
        rp.write_report(report, output / rp.REPORT_FILE)
        if settings.page:
            evaluation.draw(found, results.get((subject.key, "examples")), report)
    return report, output


def report_folder(settings: ReportSettings, models: Models, plan: pl.Plan) -> Path:
    """Where the report goes: given, or named after the weights, and the threat model if it is not that of training."""
    subject = models.subject
    threat = rp.ThreatModel(norm=plan.norm, epsilon=plan.epsilon)
    name = subject.key if threat.slug == subject.threat_model.slug else f"{subject.key}-{threat.slug}"
    return (settings.output or Path("reports") / name).expanduser().absolute()


def identity(settings: ReportSettings, models: Models, plan: pl.Plan) -> dict[str, Any]:
    """What makes two evaluations the same one: weights, data and protocol, whatever the models' addresses."""
    surrogate = models.surrogate.facts.weights_sha256 if models.surrogate is not None else None
    return {
        "weights": [each.facts.weights_sha256 for each in models.all],
        "surrogate": surrogate,
        "data": models.dataset.fingerprint,
        "threat model": f"{plan.norm} {plan.epsilon!r}",
        "settings": pl.protocol(plan, settings),
    }


def open_folder(output: Path, mine: Mapping[str, Any], *, page: bool = True) -> bool:
    """Claim the folder of a report, which is made if missing; whether the same evaluation has finished there.

    `page` makes its page part of that. ConfigError if it holds anything else, UnavailableError if not writable.
    """
    mark = output / _IDENTITY
    try:
        if output.exists() and not mark.is_file() and any(path.name != LOCK_FILE for path in output.iterdir()):
            raise ConfigError("output", output, "holds other files", "choose another --output")
        if mark.is_file():
            found = json.loads(mark.read_text())
            differ = [name for name, value in mine.items() if found.get(name) != value]
            if differ:
                reason = f"holds an evaluation that differs in {', '.join(differ)}"
                raise ConfigError("output", output, reason, "choose another --output, or delete it")
        output.mkdir(parents=True, exist_ok=True)
        write_whole(mark, json.dumps(mine, indent=1))
    except (OSError, ValueError) as error:
        reason = f"cannot be written ({one_line(error)})"
        raise UnavailableError("output", output, reason, "choose another --output") from error
    return (output / (rp.PAGE_FILE if page else rp.REPORT_FILE)).is_file()


@dataclass(frozen=True)
class _Evaluation:
    """The steps of an evaluation."""

    settings: ReportSettings
    plan: pl.Plan
    models: Models
    output: Path
    terminal: Terminal
    relatives: list[rs.Relative] = field(default_factory=list)  # those tried so far
    transferred: list[Task] = field(default_factory=list)

    def tasks(self) -> list[Task]:
        """What is measured of every test image; ConfigError if so few are taken that all of them are set aside."""
        plan, settings, models = self.plan, self.settings, self.models
        subject, dataset = models.subject, models.dataset
        labels, config = dataset.train.labels, subject.config
        rows, held_out = torch.arange(len(labels)), None
        if config is not None and config.data.name == dataset.name:
            # Gaussians are fitted to training images; the validation split of the training run stays out.
            rows, (_, held_out) = split_training(dataset, config.data.validation_fraction, config.seed)
        bank = pl.bank_rows(rows, labels, settings.images.bank)
        tasks = []
        for each in models.all:
            tasks += pl.attack_tasks(plan, settings, dataset, each.key, is_own=each is subject)
            tasks += pl.embedding_tasks(plan, settings, dataset, each.key, bank)
        if models.surrogate is not None:
            tasks = [replace(task, surrogate=models.surrogate.network) for task in tasks]
        tasks += pl.single_tasks(plan, settings, dataset, subject.key)
        if held_out is not None and settings.images.adaptive and settings.images.representation:
            tasks.append(pl.validation_task(plan, settings, dataset, subject.key, held_out))
        for task in tasks:
            if task.split == "test" and dataset.gate[task.rows].all():
                reason = (
                    f"{task.name} takes {len(task.rows)} test images, all of which are set aside for the promotion gate"
                )
                raise ConfigError("images", None, reason, "take more images (images.*, data.test_limit)")
        return tasks

    def measure(
        self, tasks: Sequence[Task], workers: Callable[[], AbstractContextManager[Measurer]]
    ) -> tuple[Results, list[Task], str]:
        """Run all tasks, and those that depend on their results; also returns what was run, and on what hardware."""
        plan, settings, models = self.plan, self.settings, self.models
        key, dataset = models.subject.key, models.dataset
        inputs = Inputs({each.key: each.network for each in models.all}, dataset)
        without = self._no_surrogate()
        first: list[Task] = []
        if settings.images.audit and models.surrogate is not None:
            first += pl.audit_tasks(plan, settings, dataset, key, models.surrogate.network)
        elif settings.images.audit and without:
            self.terminal.say(why := f"no surrogate was given, and none could be trained ({without})")
            first += pl.audit_tasks(plan, settings, dataset, key, why)
        elif settings.images.audit:
            self.terminal.say("no --surrogate is given: training a small one for the audit's transfer check")
            first.append(pl.surrogate_task(plan, dataset, key))
        later: list[Task] = []
        if settings.images.transfer:
            for kin in models.relatives:
                later += self._transfer(kin)
            if without:
                later += self._transfer(Kin("natural", "a naturally trained surrogate", why=without))
            else:
                first.append(pl.surrogate_task(plan, dataset, key, natural=True))
        # First what others wait for, then the longest shards: at the end workers wait for a short one only.
        tasks = sorted(tasks, key=lambda task: (task.name != "bank", task.name != "autoattack"))
        with workers() as measure:
            self.terminal.say(f"measuring on {measure}")
            say = _seldom(self.terminal.say)
            results, run = run_tasks([*first, *tasks, *later], inputs, self.output, measure, say, self._follow)
        return results, run, str(measure)

    def _no_surrogate(self) -> str:
        """Why no surrogate can be trained on such images; empty if one can."""
        try:
            build_model(ARCHITECTURE, len(self.models.dataset.class_names), self.models.dataset.image_shape)
        except UserError as error:
            return str(error)
        return ""

    def _follow(self, task: Task, found: Any) -> list[Task]:
        """What is measured once a result is known."""
        plan, settings, models = self.plan, self.settings, self.models
        dataset, key = models.dataset, models.subject.key
        if task.key == (key, "surrogate"):
            self.terminal.say(describe_surrogate(found.facts))
            return pl.audit_tasks(plan, settings, dataset, key, self._built(found))
        if task.key == (key, "natural-surrogate"):
            return self._transfer(Kin("natural", describe_natural(found.facts), self._built(found)))
        if task.key == (key, "bank") and settings.images.adaptive:
            rejector = models.subject.rejector
            detectors = [fd.fitted_detector(found, settings), *([] if rejector is None else [rejector.detector])]
            return pl.adaptive_tasks(plan, settings, dataset, key, detectors)
        if task.key == (key, "natural") and settings.page:
            shown = found.only(~dataset.gate.numpy()[found.rows])
            rows = shown.rows[pick_queries(shown.embedded, settings.pictures.queries, plan.seed)]
            return [pl.query_task(plan, key, rows)] if len(rows) else []
        return []

    def _built(self, trained: TrainedSurrogate) -> nn.Module:
        dataset = self.models.dataset
        network = build_model(trained.facts.architecture, len(dataset.class_names), dataset.image_shape)
        network.load_state_dict(trained.weights)
        return network.eval()

    def _transfer(self, kin: Kin) -> list[Task]:
        """The attack on the model through a relative, if there is one."""
        self.relatives.append(rs.Relative(kin.source, kin.about, why=kin.why))
        if kin.network is None:
            return []
        task = pl.transfer_task(self.plan, self.settings, self.models.dataset, self.models.subject.key, kin)
        self.transferred.append(task)
        return [task]

    def report(self, found: Mapping[str, fd.Findings], gate: fd.Findings, hardware: str, seconds: float) -> rp.Report:
        """Put the findings together."""
        plan, settings, models = self.plan, self.settings, self.models
        subject, dataset = models.subject, models.dataset
        own = found[subject.key]
        classes = len(dataset.class_names)

        def measured(each: fd.Findings) -> dict[str, Any]:
            return {
                "accuracy": fd.accuracies(each, plan, classes),
                "detection": each.detection,
                "neighbours": fd.neighbours(each, plan, settings),
                "shift": tuple(ratios.at(epsilon) for epsilon, ratios in each.shift.items()),
            }

        def compared(other: Subject) -> rp.Compared:
            its = found[other.key]
            difference, warnings = fd.differences(own, its, plan), fd.autoattack_warnings(its.autoattack)
            return rp.Compared(model=other.facts, difference=difference, warnings=warnings, **measured(its))

        gate_accuracy = fd.accuracies(gate, plan, classes)
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
            norms=fd.norm_table(own, plan, dataset.name, dataset.image_shape),
            corruptions=own.corruptions,
            calibration=own.calibration,
            audit=own.audit,
            unit_tests=own.unit_tests,
            relatives=fd.relatives(own, self.relatives),
            certified=own.certified,
            compared=tuple(map(compared, models.others)),
            surrogate=models.surrogate.facts if models.surrogate is not None else None,
            code=code_facts(),
            seed=settings.seed,
            settings=pl.protocol(plan, settings),
            seconds=seconds,
            hardware=hardware,
            gate=rp.GateFacts(images=int(dataset.gate.sum()), accuracy=gate_accuracy, detection=gate.detection),
            **measured(own),
        )

    def write_evidence(self, report: rp.Report, outcomes: Mapping[str, ShardOutcome]) -> rp.Report:
        """Write the files for other programs, from outcomes by file; returns the report with the facts about them."""
        table, strong = outcomes[rp.OUTCOME_FILE], outcomes.get(rp.AUTOATTACK_FILE)
        names, path = self.models.dataset.class_names, self.output / rp.IMAGES_FILE
        ev.write_images(table, strong, names, path, outcomes.get(rp.TRANSFER_FILE))
        if report.audit is not None:
            ev.write_sarif(report, self.output / rp.SARIF_FILE)
        if strong is None or "adversarial" not in strong.per_image:
            return report
        facts = ev.write_adversarial(strong, report.threat_model, self.output)
        if facts.file is None:
            self.terminal.say(f"{rp.ADVERSARIAL_FILE} was not written: {facts.reason}")
        return report.model_copy(update={"adversarial": facts})

    def draw(self, found: Mapping[str, fd.Findings], examples: EmbeddedImages | None, report: rp.Report) -> None:
        """Draw the figures and write the page, last: it marks the evaluation as finished."""
        plan, models = self.plan, self.models
        subject = models.subject
        figures = Figures(self.output / "figures", found[subject.key], plan, models.dataset.class_names)
        figures.accuracy()
        figures.curves()
        figures.beyond()
        figures.certified()
        figures.detection()
        labels = {each.key: method_name(each.facts.method) for each in models.others}
        figures.shift({labels[key]: found[key] for key in labels}, method_name(subject.facts.method))
        figures.maps(self.settings, models.dataset.name)
        if examples is not None:
            figures.queries(examples, models.dataset, self.settings)
        write_page(report, figures.drawn, self.output / rp.PAGE_FILE, same_attacks=plan.is_paper)


def _seldom(say: Callable[[str], None]) -> Callable[[str], None]:
    """Passes progress on, a line every few seconds."""
    last = 0.0

    def said(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(text)

    return said
