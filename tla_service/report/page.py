"""The report as one page: everything in it, nothing fetched."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tla_service.evaluation.intervals import wilson_interval
from tla_service.evaluation.results import DetectionScore, Share
from tla_service.files import write_whole
from tla_service.report.figures import ReportFigure
from tla_service.report.paper_results import differences_from_paper, paper_row
from tla_service.report.schema import AttackFacts, Compared, Report

if TYPE_CHECKING:
    from jinja2 import Template

NORMS = {"linf": "L-infinity", "l2": "L2"}
_KINDS = {"fgsm": "FGSM", "bim": "BIM", "pgd": "PGD", "mim": "MIM", "cw": "C&W"}
_METHODS = {
    "natural": "natural training",
    "at": "AT",
    "alp": "ALP",
    "tla": "TLA",
    "tla_rn": "TLA-RN",
    "tla_sa": "TLA-SA",
}


class _Row(NamedTuple):
    """A line of a table: cells of a model, or of the paper."""

    name: str
    cells: list[str]
    kind: str


def write_page(report: Report, figures: Sequence[ReportFigure], path: Path, *, same_attacks: bool) -> None:
    """Render `report.html`, whole or not at all, with the pictures in it.

    `same_attacks` tells whether norm, radius and attacks are the paper's for this data set.
    """
    whole = {name: _whole(report, name) for name in report.accuracy}
    apart = differences_from_paper(
        report.data.name, report.model.architecture, whole["clean"].images, same_attacks=same_attacks
    )
    content = template("report.html.j2").render(
        report=report,
        columns=[name for name in report.accuracy if name != "worst"],
        marks={"passed": "✓", "failed": "✗", "not run": "-"},
        describe=lambda name: describe(report, name),
        sections=_by_section(figures),
        picture=lambda figure: "data:image/png;base64," + base64.b64encode(figure.path.read_bytes()).decode(),
        compared=_compared_table(report, with_paper=not apart),
        measures=_measure_rows(report, with_paper=not apart),
        apart=apart,
        headline=_headline(report),
        split=split_sentence(report),
        whole=whole,
        paper=None if apart else paper_row(report.data.name, report.model.method),
        method=method_name,
    )
    write_whole(path, content)


def template(name: str) -> "Template":
    """A template of the report, with filters that write figures for people."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tla_service.report", "templates"),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "area": area, "number": number, "size": size}
    return environment.get_template(name)


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


def size(epsilon: float, norm: str = "linf") -> str:
    """A radius as people write it: 8/255, or a plain number."""
    levels = epsilon * 255
    whole = norm == "linf" and abs(levels - round(levels)) < 1e-6 and round(levels) < 128
    return f"{round(levels)}/255" if whole else f"{epsilon:.4g}"


def method_name(method: str) -> str:
    """A method as tables write it."""
    return _METHODS.get(method, method)


def describe(report: Report, name: str) -> str:
    """How a column was measured, in a line."""
    if name == "clean":
        return "no attack"
    if name == "autoattack":
        facts = report.autoattack
        return "" if facts is None else f"{facts.version}: {', '.join(facts.stages)}"
    attack, threat = report.attacks[name], report.threat_model
    other = (attack.norm, attack.epsilon) != (threat.norm, threat.epsilon)
    radius = f", up to {size(attack.epsilon, attack.norm)} in {NORMS[attack.norm]}" if other else ""
    return _describe_attack(attack) + radius


def _describe_attack(facts: AttackFacts) -> str:
    kind = _KINDS[facts.kind]
    if facts.kind == "fgsm":
        return f"{kind}, one step"
    restarts = f", {facts.num_restarts} starts" if facts.num_restarts > 1 else ""
    crafted = ", crafted on the surrogate" if facts.transfer else ""
    return f"{kind}, {facts.num_steps} steps of {size(facts.step_size, facts.norm)}{restarts}{crafted}"


def split_sentence(report: Report) -> str:
    """Which test images the figures are of, and why not of all."""
    if report.gate is None:
        return f"Figures are of all {report.data.images} test images, which the promotion gate decides on, too."
    return (
        f"Figures are of {report.data.images - report.gate.images} of the {report.data.images} test images. The other "
        f"{report.gate.images} are set aside for the promotion gate: one in four of each class, the same for every "
        "model. No figure is of an image that a champion was chosen on."
    )


def _whole(report: Report, name: str) -> Share:
    """Accuracy on all test images, those that are set aside for the gate among them: what the paper reports."""
    parts = [report.accuracy[name], *([report.gate.accuracy[name]] if report.gate is not None else [])]
    right = sum(round(part.estimate * part.images) for part in parts if part.estimate is not None)
    return wilson_interval(right, sum(part.images for part in parts))


def _by_section(figures: Sequence[ReportFigure]) -> dict[str, list[ReportFigure]]:
    sections: dict[str, list[ReportFigure]] = {}
    for figure in figures:
        sections.setdefault(figure.section, []).append(figure)
    return sections


def _headline(report: Report) -> list[tuple[str, str, str]]:
    """Name, figure and note of the few figures that matter most."""
    shown = [("clean", "Clean accuracy"), ("worst", "Under every attack of the table"), ("autoattack", "AutoAttack")]
    lines = [
        (title, f"{percent(report.accuracy[name].estimate)} %", interval(report.accuracy[name]))
        for name, title in shown
        if name in report.accuracy
    ]
    if report.detection is not None and report.detection.auc is not None:
        lines.append(("Detection, area under ROC", f"{percent(report.detection.auc)} %", interval(report.detection)))
    return lines


def _compared_table(report: Report, *, with_paper: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows, an attack a row: each model's accuracy, the paper's where it may stand there, differences."""
    names = [name for name in report.accuracy if name != "worst"]
    header, columns = ["attack"], [names]

    def add(title: str, cells: list[str]) -> None:
        header.append(title)
        columns.append(cells)

    models = [(report.model, report.accuracy), *((other.model, other.accuracy) for other in report.compared)]
    for model, accuracy in models:
        add(_label(model.method, model.uri), [percent(accuracy[n].estimate) if n in accuracy else "-" for n in names])
        row = paper_row(report.data.name, model.method) if with_paper else None
        if row is not None:
            found = [f"{row.accuracy[name]:.2f}" if name in row.accuracy else "" for name in names]
            add(f"{method_name(model.method)}, paper", found)
    for other in report.compared:
        title = f"{method_name(report.model.method)} minus {method_name(other.model.method)}"
        add(title, [_difference(other, name) for name in names])
    return header, [list(cells) for cells in zip(*columns, strict=True)]


def _difference(other: Compared, column: str) -> str:
    found = other.difference.get(column)
    if found is None:
        return "-"
    star = "*" if found.p_value < 0.05 else ""
    return f"{100 * found.difference:+.1f}{star} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _measure_rows(report: Report, *, with_paper: bool) -> list[_Row]:
    """Detection, neighbours and shift ratios by model."""
    models = [(report.model, report.detection, report.neighbours, report.shift)]
    models += [(other.model, other.detection, other.neighbours, other.shift) for other in report.compared]
    rows = []
    for model, detection, neighbours, shift in models:
        if detection is None or neighbours is None:
            continue
        cells = [area(detection), percent(neighbours.clean.estimate), percent(neighbours.attacked.estimate)]
        cells += [text for level in shift for text in (number(level.r), number(level.r_prime))]
        rows.append(_Row(_label(model.method, model.uri), cells, "own"))
        paper = paper_row(report.data.name, model.method) if with_paper else None
        if paper is not None:
            votes = ["", ""] if paper.neighbours is None else [f"{value:.2f}" for value in reversed(paper.neighbours)]
            printed = ["" if paper.detection is None else f"{paper.detection:.2f}", *votes]
            for level in shift:
                near = [pair for at, pair in paper.shift.items() if abs(at - level.epsilon) < 1e-6]
                printed += [f"{value:g}" for value in near[0]] if near else ["", ""]
            rows.append(_Row("as the paper has it", printed, "paper"))
    return rows


def _label(method: str, uri: str) -> str:
    return f"{method_name(method)}  {uri if len(uri) <= 48 else '...' + uri[-45:]}"
