"""A report for people: one page with everything in it and nothing fetched, and lines in the terminal."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tla_service.evaluation.paper import differences_from_paper, paper_row
from tla_service.evaluation.results import DetectionScore, Share, SurrogateFacts, wilson_interval
from tla_service.files import write_whole
from tla_service.report.figures import ReportFigure
from tla_service.report.schema import PAGE_FILE, REPORT_FILE, ModelFacts, Report, size
from tla_service.report.settings import ImageCounts
from tla_service.training.reporting import Terminal

if TYPE_CHECKING:
    from jinja2 import Template

NORMS = {"linf": "L-infinity", "l2": "L2", "l1": "L1", "l0": "L0"}
_KINDS = {"bim": "BIM", "pgd": "PGD", "mim": "MIM", "cw": "C&W"}


def write_page(report: Report, figures: Sequence[ReportFigure], path: Path, *, same_attacks: bool) -> None:
    """Render `report.html`; `same_attacks` tells whether norm, radius and attacks are the paper's for this data set."""
    whole = {name: _whole(report, name) for name in report.accuracy}
    apart = differences_from_paper(
        report.data.name, report.model.architecture, whole["clean"].images, same_attacks=same_attacks
    )
    content = template("report.html.j2").render(
        report=report,
        models=[report, *report.compared],
        figures=figures,
        describe=lambda name: describe(report, name),
        picture=lambda figure: "data:image/png;base64," + base64.b64encode(figure.path.read_bytes()).decode(),
        paper=lambda model: (
            None
            if apart or model.architecture != report.model.architecture
            else paper_row(report.data.name, model.method)
        ),
        apart=apart,
        alike=_measured_as_in_the_paper(report),
        split=split_sentence(report),
        whole=whole,
        classes=by_class(report),
        method=method_name,
        norms=NORMS,
    )
    write_whole(path, content)


def template(name: str) -> "Template":
    """A template of the report, with filters that write figures for people."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tla_service.report", "templates"),
        autoescape=name.endswith(".html.j2"),
        finalize=None if name.endswith(".html.j2") else _without_tags,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (percent, interval, area, number, printed, size)}
    return environment.get_template(name)


def _without_tags(value: object) -> object:
    """Text of a Markdown card: what shows it takes HTML in it for HTML."""
    return value.replace("<", "&lt;") if isinstance(value, str) else value


def percent(value: float | None, digits: int = 1) -> str:
    """A share for people; a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def interval(share: Share | DetectionScore) -> str:
    """The 95% interval of a share or an area, in percent."""
    return "" if share.low is None or share.high is None else f"{100 * share.low:.1f} to {100 * share.high:.1f}"


def area(score: DetectionScore) -> str:
    """An area under the curve in percent, or why there is none."""
    return percent(score.auc) if score.auc is not None else score.reason or "-"


def number(value: float | None) -> str:
    """A ratio or a norm."""
    return "-" if value is None else f"{value:.4g}"


def printed(value: float | None) -> str:
    """A percentage of the paper, with its digits."""
    return "" if value is None else f"{value:.2f}"


def method_name(method: str) -> str:
    """A method as tables write it; imported weights have none."""
    names = {"natural": "natural training", "imported": "imported"}
    return names.get(method) or method.upper().replace("_", "-")


def model_names(models: Sequence[ModelFacts]) -> list[str]:
    """Models by their methods; those of one method are told apart by the first digits of their weights' SHA-256."""
    names = [method_name(each.method) for each in models]
    digits = [f" {each.weights_sha256[:6]}" for each in models]
    return [name + mark if names.count(name) > 1 else name for name, mark in zip(names, digits, strict=True)]


def describe(report: Report, name: str) -> str:
    """How a column was measured, in a line."""
    if name == "clean":
        return "no attack"
    if name == "autoattack":
        facts = report.autoattack
        return "" if facts is None else f"{facts.version}: {', '.join(facts.stages)}"
    attack, threat = report.attacks[name], report.threat_model
    other = (attack.norm, attack.epsilon) != (threat.norm, threat.epsilon)
    radius = f", up to {size(attack.epsilon)} in {NORMS[attack.norm]}" if other else ""
    if attack.kind == "fgsm":
        return f"FGSM, one step{radius}"
    restarts = f", {attack.num_restarts} starts" if attack.num_restarts > 1 else ""
    crafted = ", crafted on the surrogate" if attack.transfer else ""
    steps = f"{attack.num_steps} steps of {size(attack.step_size)}"
    return f"{_KINDS.get(attack.kind, attack.kind)}, {steps}{restarts}{crafted}{radius}"


def split_sentence(report: Report) -> str:
    """Which test images the figures are of, and why not of all."""
    images, gate = report.data.images, report.gate.images
    return (
        f"Figures are of up to {images - gate} of the {images} test images. The other {gate} are set aside for the "
        "promotion gate: one in four of each class, the same for every model. Only the gate's own figures and the "
        "audit are of images that a champion was chosen on."
    )


def _whole(report: Report, name: str) -> Share:
    """Accuracy on all test images, those that are set aside for the gate among them: what the paper reports."""
    parts = report.accuracy[name], report.gate.accuracy[name]
    right = sum(round(part.estimate * part.images) for part in parts if part.estimate is not None)
    return wilson_interval(right, sum(part.images for part in parts))


def _measured_as_in_the_paper(report: Report) -> bool:
    """Whether embeddings are of all test images, but the gate's, and of the usual number of training images."""
    found = report.neighbours
    shown = report.data.images - report.gate.images
    return found is not None and found.clean.images == shown and found.bank >= ImageCounts().bank


def by_class(report: Report) -> list[tuple[str, list[Share]]]:
    """Accuracy of each class, clean, under every attack of the table and under AutoAttack; the weakest class first."""
    columns = [report.accuracy[name].per_class for name in ("clean", "worst", "autoattack") if name in report.accuracy]
    rows = [(name, list(shares)) for name, *shares in zip(report.data.class_names, *columns, strict=False)]
    return sorted(rows, key=lambda row: 2.0 if row[1][1].estimate is None else row[1][1].estimate)


def show(report: Report, output: Path, terminal: Terminal) -> None:
    """Print the figures, what casts doubt on them, and where the report is."""
    terminal.say("")
    terminal.say(split_sentence(report))
    for name, found in report.accuracy.items():
        terminal.say(_line(name, found))
    for name, shares in by_class(report)[:1]:
        terminal.say(f"{_line('worst class', shares[1])}   ({name}, {shares[1].images} images)")
    corrupted = report.corruptions
    if corrupted is not None and corrupted.mean_error is not None:
        mean = Share(1 - corrupted.mean_error, 1 - corrupted.high, 1 - corrupted.low, corrupted.images)
        terminal.say(_line("corruptions, mean", mean))
    if report.detection is not None:
        terminal.say(f"{'detection AUC':<18} {percent(report.detection.auc, 2):>7} %")
        attacked = report.detection.attacked
        if attacked is not None:
            evaded = percent(attacked.selective["adaptive"].evaded.estimate)
            line = f"{'  adaptive attack':<18} {percent(attacked.auc, 2):>7} %   95%: {interval(attacked)}"
            unaware = f"unaware at this radius: {percent(attacked.unaware.auc)} %"
            terminal.say(f"{line}   ({unaware}; {evaded} % of images misclassified and accepted)")
    for warning in report.autoattack.warnings if report.autoattack is not None else ():
        terminal.say(f"AutoAttack warns: {warning}")
    for other in report.compared:
        for warning in other.warnings:
            terminal.say(f"AutoAttack warns about {other.model.uri}: {warning}")
    if report.audit is not None:
        terminal.say(f"audit: {'trusted' if report.audit.trusted else 'NOT trusted'}, {report.audit.summary}")
    page = output / PAGE_FILE
    terminal.say(f"report  {page if page.is_file() else output / REPORT_FILE}")


def _line(name: str, found: Share) -> str:
    return f"{name:<18} {percent(found.estimate, 2):>7} %   95%: {percent(found.low)} to {percent(found.high)}"


def describe_surrogate(facts: SurrogateFacts, *, natural: bool = False) -> str:
    """A surrogate that was trained on the spot, in a line; a natural one without times, which differ."""
    about = f"a {facts.architecture} trained naturally for {facts.steps} steps"
    if not natural:
        spent = f"{facts.steps} steps on {facts.images} training images in {facts.seconds:.0f} s"
        about = f"trained {facts.architecture}: {spent}"
    if facts.clean_accuracy is None:
        return about
    return f"{about}, clean accuracy {percent(facts.clean_accuracy)} % on {facts.held_out} held-out images"
