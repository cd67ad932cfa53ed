"""What an evaluation says in the terminal at its end."""

from pathlib import Path

from tla_service.evaluation.results import SurrogateFacts
from tla_service.report.page import percent, split_sentence
from tla_service.report.schema import PAGE_FILE, REPORT_FILE, Report
from tla_service.training.reporting import Terminal


def show(report: Report, output: Path, terminal: Terminal) -> None:
    """Print the figures, what casts doubt on them, and where the report is."""
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
            terminal.say(f"AutoAttack warns about {other.model.uri}: {warning}")
    if report.audit is not None:
        terminal.say(f"audit: {'trusted' if report.audit.trusted else 'NOT trusted'}, {report.audit.summary}")
    page = output / PAGE_FILE
    terminal.say(f"report  {page if page.is_file() else output / REPORT_FILE}")


def describe_surrogate(facts: SurrogateFacts) -> str:
    """The surrogate that was trained for the audit, in a line."""
    text = (
        f"trained {facts.architecture}: {facts.steps} steps on {facts.images} training images in {facts.seconds:.0f} s"
    )
    if facts.clean_accuracy is None:
        return text
    return f"{text}, clean accuracy {percent(facts.clean_accuracy)} % on {facts.held_out} held-out images"
