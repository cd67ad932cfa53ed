"""From models to a report: check, measure, write."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tla_service.data import ImageSource
from tla_service.data.augmentation import to_unit
from tla_service.errors import ConfigError, UnavailableError, one_line
from tla_service.evaluation.certified import ROW, Certificates
from tla_service.evaluation.detection import check_detector_size
from tla_service.evaluation.embedding import EmbeddedImages
from tla_service.evaluation.shards import ShardOutcome, evaluating, save_arrays, save_outcome
from tla_service.files import LOCK_FILE, expanded, locked_folder, sha256, write_whole
from tla_service.job import code_facts
from tla_service.report import evidence as ev
from tla_service.report import findings as fd
from tla_service.report import plan as pl
from tla_service.report import schema as rp
from tla_service.report import tables as tb
from tla_service.report.figures import Figures
from tla_service.report.loading import Models
from tla_service.report.measuring import Measuring
from tla_service.report.page import model_names, write_page
from tla_service.report.settings import ReportSettings
from tla_service.report.subjects import Subject
from tla_service.report.tasks import Measurer, select
from tla_service.training.own import check_attack
from tla_service.training.reporting import Terminal

_IDENTITY = "evaluation.json"
_TRIED_ON = 8  # training images that own attacks are called on before anything is measured


def evaluate(
    settings: ReportSettings,
    models: Models,
    workers: Callable[[], Measurer],
    terminal: Terminal,
) -> tuple[rp.Report, Path]:
    """Evaluate models and write the report; returns it, and the folder it is in.

    Shards are saved as they come in: the same evaluation, under whatever address of the weights, resumes where it was
    stopped or killed. `workers` starts what measures once everything is checked. UserError if something is wrong or
    missing, found before anything is measured as far as it can be.
    """
    subject, dataset = models.subject, models.dataset
    threat = subject.facts.trained_for
    plan = pl.make_plan(settings, dataset.name, threat.norm, threat.epsilon, has_surrogate=models.surrogate is not None)
    pl.check_plan(plan, dataset.image_shape, len(dataset.class_names))
    _try_own_attacks(plan, subject.network, dataset.train)
    if settings.images.representation:
        for each in models.all:
            width = each.network.embedding_size
            check_detector_size(settings.detection.covariance, len(dataset.class_names), width)
    output = report_folder(models, plan)
    measuring = Measuring(plan, models, output, terminal)
    tasks = measuring.tasks()
    with locked_folder(output, "output"):
        if open_folder(output, identity(models, plan), page=settings.page):
            terminal.say("this evaluation has finished before; choose another --output to make it again")
            # The address may be another one this time.
            return rp.read_report(output / rp.REPORT_FILE).model_copy(update={"model": subject.facts}), output
        terminal.say(f"evaluating {subject.facts.uri} on {dataset.name}, output in {output}")
        began = time.monotonic()
        results, tasks, hardware = measuring.measure(tasks, workers)
        set_aside = dataset.gate.numpy()
        published = select(results, tasks, ~set_aside)
        found = {each.key: fd.gather(published, each.key, plan, each.rejector) for each in models.all}
        gate = fd.gather(select(results, tasks, set_aside), subject.key, plan, subject.rejector)
        report = _report(measuring, found, gate, hardware, time.monotonic() - began)
        measured: dict[str, ShardOutcome | None] = {
            rp.OUTCOME_FILE: results[subject.key, "columns"],
            rp.AUTOATTACK_FILE: results.get((subject.key, "autoattack")),
            rp.TRANSFER_FILE: fd.transferred(results, subject.key),
        }
        outcomes: dict[str, ShardOutcome] = {}
        for file, outcome in measured.items():
            if outcome is not None:
                outcomes[file] = replace(outcome, gate=set_aside[outcome.indices])
                save_outcome(replace(outcomes[file], per_image={}), output / file)
        certificates: Certificates | None = results.get((subject.key, "certified"))
        if certificates is not None:
            save_arrays({name: certificates[name] for name in ROW.names or ()}, output / rp.CERTIFIED_FILE)
        report = _write_evidence(measuring, report, outcomes)
        rp.write_report(report, output / rp.REPORT_FILE)
        if settings.page:
            _draw(measuring, found, results.get((subject.key, "examples")), report)
    return report, output


def _try_own_attacks(plan: pl.Plan, network: nn.Module, train: ImageSource) -> None:
    own = {name: attack for name, attack in plan.columns.items() if attack.function is not None}
    if not own:
        return
    rows = torch.linspace(0, len(train) - 1, _TRIED_ON).long()
    images, labels = to_unit(train.fetch(rows)), train.labels[rows]
    with evaluating(network):
        for name, attack in own.items():
            check_attack(f"attacks.{name}.kind", attack.kind, attack, network, images, labels, torch.Generator())


def report_folder(models: Models, plan: pl.Plan) -> Path:
    """Where the report goes: given, or named after the weights, and the threat model if it is not that of training."""
    subject = models.subject
    threat = rp.ThreatModel(norm=plan.norm, epsilon=plan.epsilon)
    name = subject.key if threat.slug == subject.facts.trained_for.slug else f"{subject.key}-{threat.slug}"
    return expanded("output", plan.settings.output or Path("reports") / name).absolute()


def identity(models: Models, plan: pl.Plan) -> dict[str, Any]:
    """What makes two evaluations the same one: networks, data and protocol, whatever the models' addresses."""

    def built(each: Subject) -> list[str | None]:  # weights do not tell a normalization
        a = each.architecture
        return [a.name, a.normalization, a.embedding, a.activation, a.code_sha256]

    facts: dict[str, Any] = {
        "weights": [each.facts.weights_sha256 for each in models.all],
        "architecture": [built(each) for each in models.all],
        "data": models.dataset.fingerprint,
        "threat model": f"{plan.norm} {plan.epsilon!r}",
        "settings": pl.protocol(plan),
    }
    if plan.transfer or plan.settings.images.audit:  # what uses a surrogate
        facts["surrogate"] = models.surrogate.facts.weights_sha256 if models.surrogate is not None else None
        if models.surrogate is not None:
            facts["architecture of the surrogate"] = built(models.surrogate)
    if any(each.rejector for each in models.all):
        facts["detector"] = [each.rejector and each.rejector.digest for each in models.all]
    own = sorted({attack.kind for attack in plan.columns.values() if ":" in attack.kind})
    return facts | ({"code of attacks": {name: _file_digest(name) for name in own}} if own else {})


def _file_digest(name: str) -> str:
    """SHA-256 of the file of an imported function ``package.module:function``; empty if its module has none."""
    file = sys.modules[name.partition(":")[0]].__file__
    return "" if file is None else sha256(Path(file))


def open_folder(output: Path, mine: Mapping[str, Any], *, page: bool = True) -> bool:
    """Claim the folder of a report, which is made if missing; whether the same evaluation has finished there.

    `page` makes its page part of that. ConfigError if it holds anything else, UnavailableError if not writable.
    """
    mark = output / _IDENTITY
    try:
        if mark.is_file():
            found = dict(json.loads(mark.read_text()))
            # Evaluations of earlier versions do not state these.
            later = ("architecture", "architecture of the surrogate", "code of attacks")
            added = {name: mine[name] for name in later if name in mine}
            differ = [name for name in {**mine, "detector": None} if (added | found).get(name) != mine.get(name)]
            if differ:
                reason = f"holds an evaluation that differs in {', '.join(differ)}"
                raise ConfigError("output", output, reason, "choose another --output, or delete it")
        elif output.exists() and any(path.name != LOCK_FILE for path in output.iterdir()):
            raise ConfigError("output", output, "holds other files", "choose another --output")
        output.mkdir(parents=True, exist_ok=True)
        write_whole(mark, json.dumps(mine, indent=1))
    except (OSError, ValueError, TypeError) as error:
        reason = f"cannot be used ({one_line(error)})"
        raise UnavailableError("output", output, reason, "choose another --output") from error
    return (output / (rp.PAGE_FILE if page else rp.REPORT_FILE)).is_file()


def _report(
    measuring: Measuring, found: Mapping[str, fd.Findings], gate: fd.Findings, hardware: str, seconds: float
) -> rp.Report:
    """Put the findings together."""
    plan, models = measuring.plan, measuring.models
    subject, dataset = models.subject, models.dataset
    own = found[subject.key]
    classes = len(dataset.class_names)

    def measured(each: fd.Findings) -> dict[str, Any]:
        return {
            "accuracy": tb.accuracies(each, plan, classes),
            "detection": each.detection,
            "neighbours": tb.neighbours(each, plan),
            "shift": tuple(ratios.at(epsilon) for epsilon, ratios in each.shift.items()),
        }

    def compared(other: Subject) -> rp.Compared:
        its = found[other.key]
        difference, warnings = tb.differences(own, its, plan), tb.autoattack_warnings(its.autoattack)
        return rp.Compared(model=other.facts, difference=difference, warnings=warnings, **measured(its))

    gate_accuracy = tb.accuracies(gate, plan, classes)
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
        attacks=tb.attack_facts(plan),
        autoattack=tb.autoattack_facts(own, plan),
        curves=own.curves,
        sparse=own.norms,
        norms=tb.norm_table(own, plan, dataset.name, dataset.image_shape),
        corruptions=own.corruptions,
        calibration=own.calibration,
        audit=own.audit,
        unit_tests=own.unit_tests,
        relatives=tb.relatives(own, measuring.relatives),
        certified=own.certified,
        compared=tuple(map(compared, models.others)),
        surrogate=models.surrogate.facts if models.surrogate is not None else None,
        code=code_facts(),
        seed=plan.seed,
        settings=pl.protocol(plan),
        seconds=seconds,
        hardware=hardware,
        gate=rp.GateFacts(images=int(dataset.gate.sum()), accuracy=gate_accuracy, detection=gate.detection),
        **measured(own),
    )


def _write_evidence(measuring: Measuring, report: rp.Report, outcomes: Mapping[str, ShardOutcome]) -> rp.Report:
    """Write the files for other programs, from outcomes by file; returns the report with the facts about them."""
    table, strong = outcomes[rp.OUTCOME_FILE], outcomes.get(rp.AUTOATTACK_FILE)
    names, path = measuring.models.dataset.class_names, measuring.output / rp.IMAGES_FILE
    ev.write_images(table, strong, names, path, outcomes.get(rp.TRANSFER_FILE))
    if report.audit is not None:
        ev.write_sarif(report, measuring.output / rp.SARIF_FILE)
    if strong is None or "adversarial" not in strong.per_image:
        return report
    facts = ev.write_adversarial(strong, measuring.output)
    if facts.file is None:
        measuring.terminal.say(f"{rp.ADVERSARIAL_FILE} was not written: {facts.reason}")
    return report.model_copy(update={"adversarial": facts})


def _draw(
    measuring: Measuring, found: Mapping[str, fd.Findings], examples: EmbeddedImages | None, report: rp.Report
) -> None:
    """Draw the figures and write the page, last: it marks the evaluation as finished."""
    plan, models = measuring.plan, measuring.models
    figures = Figures(measuring.output / "figures", found[models.subject.key], plan, models.dataset.class_names)
    figures.accuracy()
    figures.curves()
    figures.beyond()
    figures.certified()
    figures.detection()
    names = model_names([each.facts for each in models.all])
    figures.shift({name: found[each.key] for name, each in zip(names, models.all, strict=True)})
    figures.maps(models.dataset.name)
    if examples is not None:
        figures.queries(examples, models.dataset)
    write_page(report, figures.drawn, measuring.output / rp.PAGE_FILE, same_attacks=plan.is_paper)
