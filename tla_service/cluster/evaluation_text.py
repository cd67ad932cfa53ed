"""What an evaluation says in the terminal at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tla_service.job import next_command
from tla_service.registry.evaluation_card import as_trained
from tla_service.report.page import percent, split_sentence
from tla_service.report.schema import Report
from tla_service.report.settings import EvaluateSettings
from tla_service.training.reporting import Terminal


def show(report: Report, page: Path, terminal: Terminal) -> None:
    """Print the figures, what casts doubt on them, and where the page is."""
    terminal.say("")
    if report.gate is not None:
        terminal.say(split_sentence(report))
    for name, found in report.accuracy.items():
        terminal.say(
            f"{name:<18} {percent(found.estimate, 2):>7} %   95%: {percent(found.low)} to {percent(found.high)}"
        )
    if report.detection is not None:
        terminal.say(f"{'detection AUC':<18} {percent(report.detection.auc, 2):>7} %")
    for warning in report.autoattack.warnings if report.autoattack is not None else ():
        terminal.say(f"AutoAttack warns: {warning}")
    for other in report.compared:
        for warning in other.warnings:
            terminal.say(f"AutoAttack warns of {other.model.uri}: {warning}")
    if report.audit is not None:
        terminal.say(f"audit: {'trusted' if report.audit.trusted else 'NOT trusted'}, {report.audit.summary}")
    terminal.say(f"report  {page}")


def describe_surrogate(facts: Mapping[str, Any]) -> str:
    """The surrogate that was trained for the audit, in a line."""
    accuracy = f", clean accuracy {percent(facts['clean_accuracy'])} % on {facts['held_out']} held-out images"
    return (
        f"trained {facts['architecture']}: {facts['steps']} steps on {facts['images']} training images in "
        f"{facts['seconds']:.0f} s" + (accuracy if facts["clean_accuracy"] is not None else "")
    )


def next_step(report: Report, tagged: Sequence[str], settings: EvaluateSettings, page: Path) -> str:
    """The line that says what to run or read next: the promotion of a version that may pass, else the page.

    Args:
        report: The evaluation.
        tagged: Versions that were tagged with it, as ``NAME/VERSION``.
        settings: The evaluation's.
        page: The report's page.
    """
    trusted = report.audit is not None and report.audit.trusted
    if not (tagged and trusted and as_trained(report)):
        return f"next: open {page}"
    asked = f"{report.model.name}/{report.model.version}"
    name, _, version = (asked if asked in tagged else tagged[-1]).rpartition("/")
    arguments = ["--model", name, "--version", version]
    if settings.tracking.uri is not None:
        arguments += ["--tracking.uri", settings.tracking.uri]
    return next_command("promote_model.py", *arguments)
