"""The page of a table: our results with intervals, the paper's beside them, comparisons, and what is missing."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tla_service.config import RunConfig
from tla_service.evaluation.figures import BLUE, ORANGE, new_figure, plain, save
from tla_service.evaluation.paper import differences_from_paper, paper_row
from tla_service.results import tuned
from tla_service.results.runs import (
    AUTOATTACK,
    Estimate,
    Measured,
    Row,
    TableRun,
    read_row,
    share_of_budget,
    table_runs,
)
from tla_service.results.settings import ReproduceSettings
from tla_service.results.tuned_page import comparison_lines, cost_text, gain_cells, label, protocol_text, search_lines
from tla_service.tuning.space import Space

_FLAT = 1e-9  # width of an interval over equal differences
_TITLES = {
    "paper": "the paper's table",
    "modern": "the modern recipe and its baselines",
    "tuned": "every method tuned by a search of the same length",
}


def write_page(settings: ReproduceSettings, space: Space, source: Path, state: Path) -> Path:
    """Write the page and its figures from the measured runs in `source` and the trials in `state`; returns its path."""
    path, runs, is_tuned = settings.page, table_runs(settings), settings.recipe == "tuned"
    by_row: dict[str, list[TableRun]] = {name: [] for name in tuned.protocol(settings.table).arms} if is_tuned else {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_row.setdefault(run.row, []).append(run)
    rows = {name: read_row(label(name), each, source) for name, each in by_row.items()}
    finished = [row for row in rows.values() if row.runs]
    lines = [f"# {settings.table}: {_TITLES[settings.recipe]}", "", *_settings(settings, space.run, finished), ""]
    if finished:
        reports = [each.report for row in finished for each in row.runs]  # not all were measured alike
        attacks = {name: attack for each in reports for name, attack in each.attacks.items()}
        autoattack = [AUTOATTACK] if any(each.autoattack for each in reports) else []
        pgd = {name: attack for name, attack in attacks.items() if attack.kind == "pgd" and not attack.transfer}
        iterative = max(pgd, key=lambda name: pgd[name].num_steps)
        strong = [iterative, *autoattack]
        _draw_methods(finished, ["clean", *strong], path.parent / "pictures" / f"{settings.page_name}-methods.png")
        lines += [f"![Methods](pictures/{settings.page_name}-methods.png)", "", "## Accuracy, %", ""]
        gain = iterative if is_tuned else ""
        lines += [*_table(settings, rows, ["clean", *attacks, *autoattack], gain), ""]
        if any(each.detection for each in reports):
            names = ["detection", "neighbours clean", "neighbours attacked"]
            radii = dict.fromkeys(f"{at.epsilon:.3g}" for each in reports for at in each.shift)
            names += [f"{kind} {radius}" for radius in radii for kind in ("r", "r'")]
            lines += ["## Representation", "", *_table(settings, rows, names), ""]
            lines += ["Detection is the area under the ROC curve, neighbours are accuracies, both in percent. Higher r "
                      "and lower r' are better. Test images set aside for the promotion gate are left out.",
                      ""]  # fmt: skip
        measures = ["clean", *strong, "detection", "neighbours attacked"]
        compared = comparison_lines(settings.table, rows) if is_tuned else _comparison(rows, measures)
        lines += ["## Comparison", "", *compared, ""]
    if is_tuned:
        picture = path.parent / "pictures" / f"{settings.page_name}-trials.png"
        lines += ["## Searches", "", *search_lines(settings.table, state, picture), ""]
        lines += [cost_text(settings.table, state, finished), ""]
    lines += _missing(settings, finished)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def command(settings: ReproduceSettings) -> str:
    """The command that makes the page."""
    parts = {
        f"python jobs/reproduce_paper.py --table {settings.table}": True,
        f"--budget {settings.budget or 0:g}": settings.budget is not None,
        f"--seeds {settings.num_seeds}": settings.recipe != "tuned" or settings.seeds is not None,
        f"--recipe {settings.recipe}": settings.recipe != "paper",
        f"--methods {' '.join(settings.methods)}": settings.methods,
        f"--data.root /data/{settings.table}": settings.data.root is not None,
    }
    return " ".join(part for part, is_given in parts.items() if is_given)


def _settings(settings: ReproduceSettings, config: RunConfig, rows: Sequence[Row]) -> list[str]:
    measured = [each for row in rows for each in row.runs]
    devices = ", ".join(sorted({each.report.hardware for each in measured}))
    data = {f"{len(each.report.data.class_names)} classes, {_images(each)} test images" for each in measured}
    commits = ", ".join(sorted({each.report.code.get("commit", each.report.code["version"]) for each in measured}))
    made = f"; runs evaluated at {commits} on {devices}; {'; '.join(sorted(data))}." if commits else "."
    lines = [f"Made by `{command(settings)}`{made}"]
    if settings.recipe == "tuned":
        lines += ["", protocol_text(settings.table, config, settings.num_seeds)]
    if settings.budget is not None:
        attack = config.attack
        whose = "the paper's" if settings.recipe == "paper" else f"those of preset `modern_{settings.table}`"
        grows = f", epsilon growing over the first {attack.warmup:.0%}" if attack.warmup else ""
        lines += ["", f"**Reduced settings**, {share_of_budget(settings):.0%} of their full length: network "
                  f"`{config.model.name}`, {config.training.max_steps} steps of {config.training.global_batch_size} "
                  f"images, training with PGD-{attack.num_steps}{grows}. These are not {whose}: do not compare the "
                  "results with published ones."]  # fmt: skip
    images = max((len(each.standing["clean"]) for each in measured), default=0)
    apart = differences_from_paper(settings.table, config.model.name, images, same_attacks=settings.budget is None)
    if apart and images and settings.recipe == "paper":
        lines += ["", f"Differences from the paper's table: {'; '.join(apart)}."]
    lines += ["", "Cells are means over seeds with Student's 95% interval, for the weights chosen on validation."]
    if settings.budget_name == "paper":
        lines[-1] += " Rows marked *paper* are the paper's own results."
    warnings: dict[str, list[str]] = {}
    for each in measured:
        for warning in each.report.autoattack.warnings if each.report.autoattack is not None else ():
            alike = re.sub(r"\d+ of \d+ ", "", warning)  # a line for all runs; their reports have the counts
            warnings.setdefault(alike, []).append(f"`{each.run.name}`")
    for warning, names in warnings.items():
        lines += ["", f"AutoAttack warns about {', '.join(names)}: {warning}."]
    return lines


def _table(settings: ReproduceSettings, rows: Mapping[str, Row], names: Sequence[str], gain: str = "") -> list[str]:
    """A row for each method; with `gain`, the name of a measure, its difference from AT in a last column."""
    gains = gain_cells(settings.table, rows, gain) if gain else {}
    titles = [*names, *([f"{gain} less AT"] if gain else [])]
    lines = ["| method | seeds | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(titles)]
    for method, row in rows.items():
        cells = [_cell(Estimate.over_seeds(row.values(name)), name) for name in names]
        cells += [gains.get(method, "")] if gain else []
        lines.append(f"| {row.label} | {_seeds(row, names)} | " + " | ".join(cells) + " |")
        paper = paper_row(settings.table, method) if settings.budget_name == "paper" and "clean" in names else None
        if paper is not None:
            printed = [f"{paper.accuracy[name]:.2f}" if name in paper.accuracy else "" for name in names]
            lines.append(f"| *{row.label}, paper* | | " + " | ".join(printed) + " |")
    return lines


def _seeds(row: Row, names: Sequence[str]) -> str:
    """How many seeds the first figure is of, and which of the others are of another number."""
    counts = {name: len(row.values(name)) for name in names}
    first = counts[names[0]]
    return ", ".join([str(first), *(f"{name} {count}" for name, count in counts.items() if count not in (0, first))])


def _cell(estimate: Estimate | None, name: str) -> str:
    if estimate is None:
        return ""
    return estimate.text(".3f", scale=1) if name.split()[0] in ("r", "r'") else estimate.text(".1f")


def _images(measured: Measured) -> str:
    count, there = len(measured.standing["clean"]), measured.report.data.images
    return f"{count:,}" if count == there else f"{count:,} of {there:,}"


def _comparison(rows: Mapping[str, Row], names: Sequence[str]) -> list[str]:
    """TLA against each adversarially trained baseline, measure by measure."""
    if "tla" not in rows or not rows["tla"].runs:
        return ["TLA has not been measured yet."]
    ours = rows["tla"]
    others = [row for method, row in rows.items() if method not in ("natural", "tla") and ours.paired(row)]
    if not others:
        return ["There is no baseline to compare TLA with yet."]
    lines = [f"- TLA minus {other.label}, in points {_compared(ours, other, names)}." for other in others]
    note = ("*Not separated*: the interval contains zero. Intervals are not corrected for multiple comparisons: of "
            "twenty between equal methods, one is expected to exclude zero.")  # fmt: skip
    return [*lines, "", note]


def _compared(ours: Row, other: Row, names: Sequence[str]) -> str:
    verdicts = []
    for name in names:
        found = ours.minus(other, name)
        if found is None:
            continue
        # Equal differences have no variance to judge by, by chance: on few images accuracies tie.
        is_flat = len(ours.paired(other)) > 1 and found.high - found.low < _FLAT
        says = "**better**" if found.low > 0 else "**worse**" if found.high < 0 else "not separated"
        says = "not separated (equal at every seed)" if is_flat else says
        verdicts.append(f"{name} {found.text()} {'(one seed, no interval)' if math.isnan(found.low) else says}")
    seeds = len(ours.paired(other))
    over = f"{seeds} shared seeds" if seeds > 1 else "one shared seed: intervals are over test images"
    return f"({over}): {'; '.join(verdicts)}"


def _missing(settings: ReproduceSettings, finished: Sequence[Row]) -> list[str]:
    done = {each.run.name for row in finished for each in row.runs}
    left = [run.name for run in table_runs(settings) if run.name not in done]
    if not left:
        return []
    runs, names = f"{len(left)} run{'s' if len(left) > 1 else ''}", ", ".join(f"`{name}`" for name in left)
    return ["## Not run yet", "", f"{runs}: {names}.", "", f"`{command(settings)}` resumes the table."]


def _draw_methods(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Each seed as a dot, their mean with its 95% interval; one panel per measure, one line per method."""
    drawn = new_figure(8, 1.2 + 0.24 * len(rows))
    for name, axes in zip(names, drawn.subplots(1, len(names), sharey=True), strict=True):
        for place, row in enumerate(rows):
            values = [100 * value for value in row.values(name)]
            axes.plot(values, [place] * len(values), "o", color=ORANGE, markersize=3.5, markeredgewidth=0)
            if estimate := Estimate.over_seeds(values):
                axes.plot([estimate.low, estimate.high], [place, place], color=BLUE, linewidth=1.6)
                axes.plot(estimate.value, place, "|", color=BLUE, markersize=10, markeredgewidth=1.6)
        axes.set(xlabel=f"{name}, %", ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        plain(axes)
    save(drawn, path)
