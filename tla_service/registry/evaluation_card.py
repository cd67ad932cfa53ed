"""The model card of an evaluated version, as the registry shows it: robustness, limits, origin."""

from collections.abc import Mapping

from tla_service.report.page import NORMS, describe, percent, split_sentence, template
from tla_service.report.schema import Report, artifact_folder

_LONGEST = 5000  # MLflow's column for a version's description
_SHOWN = ("clean", "worst", "autoattack")


def evaluation_card(report: Report, others: Mapping[str, Report]) -> str:
    """Write the card in Markdown: in full for one threat model, a line for each other one.

    Args:
        report: The evaluation that was made last.
        others: Those of the same weights under other threat models, by their folders among the run's artifacts. The
            card is about the one that the model was trained for, if it is among them.
    """
    reports = {artifact_folder(report.model.weights_sha256, report.threat_model): report, **others}
    main = next((folder for folder, each in reports.items() if each.is_as_trained), next(iter(reports)))
    about = reports.pop(main)
    rows = [_row(folder, each) for folder, each in sorted(reports.items())]
    text = _card(about, main, rows, 0)
    left_out = 0
    while len(text) > _LONGEST and left_out < len(rows):
        left_out += 1
        text = _card(about, main, rows[:-left_out], left_out)
    return text


def _card(report: Report, folder: str, rows: list[str], left_out: int) -> str:
    last = [name for name in ("worst", "autoattack") if name in report.accuracy]
    by_class = zip(report.accuracy["worst"].per_class, report.data.class_names, strict=False)
    counted = [(share.estimate, name) for share, name in by_class if share.estimate is not None]
    text = template("card.md.j2").render(
        report=report,
        folder=folder,
        attacks=[name for name in report.accuracy if name not in last] + last,
        describe=lambda name: describe(report, name),
        norm=NORMS[report.threat_model.norm],
        split=split_sentence(report),
        weakest=min(counted, default=None),
        rows=rows,
        shown=_SHOWN,
        left_out=left_out,
    )
    return f"{text.rstrip()}\n"


def _row(folder: str, report: Report) -> str:
    """A line for an evaluation under another threat model."""
    estimates = [percent(report.accuracy[name].estimate if name in report.accuracy else None) for name in _SHOWN]
    audit = "not run" if report.audit is None else "trusted" if report.audit.trusted else "not trusted"
    return f"| {' | '.join([str(report.threat_model), *estimates, audit, f'`{folder}`'])} |"
