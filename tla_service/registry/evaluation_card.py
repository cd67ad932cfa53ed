"""The model card of an evaluated version, as the registry shows it: what it withstands, and what it is not for."""

from collections.abc import Mapping, Sequence

from tla_service.report.page import describe, markdown_table, percent, size, split_sentence
from tla_service.report.schema import Report, artifact_folder

_LONGEST = 5000  # MLflow's column for a version's description
_SHOWN = ("clean", "worst", "autoattack")
_NORMS = {"linf": "L-infinity", "l2": "L2"}


def evaluation_card(report: Report, others: Mapping[str, Report]) -> str:
    """Write the card in Markdown: in full for one threat model, a line for each other one.

    Args:
        report: The evaluation that was made last.
        others: Those of the same weights under other threat models, by their folders among the run's artifacts. The
            card is about the one that the model was trained for, if it is among them.
    """
    reports = {artifact_folder(report.model.weights_sha256, report.threat_model): report, **others}
    main = next((folder for folder, each in reports.items() if each.is_as_trained), next(iter(reports)))
    about = _about(reports.pop(main), main)
    rows = [_row(folder, each) for folder, each in sorted(reports.items())]
    text = "\n".join([*about, *_others(rows)])
    left_out = 0
    while len(text) > _LONGEST and left_out < len(rows):
        left_out += 1
        text = "\n".join([*about, *_others(rows[:-left_out]), f"{left_out} more: tags `tla.evaluation.*`", ""])
    return text


def _row(folder: str, report: Report) -> list[str]:
    """A line for an evaluation under another threat model."""
    estimates = [report.accuracy[name].estimate if name in report.accuracy else None for name in _SHOWN]
    audit = "not run" if report.audit is None else "trusted" if report.audit.trusted else "not trusted"
    return [str(report.threat_model), *map(percent, estimates), audit, f"`{folder}`"]


def _others(rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    header = ["threat model", *_SHOWN, "audit", "report"]
    return ["## Other threat models, accuracy in %", "", markdown_table(header, rows), ""]


def _about(report: Report, folder: str) -> list[str]:
    """The card of one evaluation, line by line."""
    threat = report.threat_model
    rows = [
        [name, describe(report, name) if name != "worst" else "every attack above", *_shown(report, name)]
        for name in _ordered(report)
    ]
    lines = [
        f"# {report.model.architecture}, {report.model.method}, on {report.data.name}",
        "",
        _verdict(report),
        "",
        f"**Threat model.** Perturbations up to {size(threat.epsilon, threat.norm)} in {_NORMS[threat.norm]} norm, "
        "pixels in [0, 1], by an adversary who knows the network.",
        "",
        "## Accuracy on test images, %",
        "",
        split_sentence(report),
        "",
        markdown_table(["attack", "how", "accuracy", "95% interval", "images"], rows),
        "",
        *_detection(report),
        "## Limits",
        "",
        "- Accuracy under attack is an upper bound: an attack not tried here may do better.",
        "- Nothing is claimed about other norms, larger radii, corruptions, or images unlike the training set.",
        *([f"- The weakest class is {_weakest(report)}."] if report.accuracy["worst"].per_class else []),
        "",
        "## Origin",
        "",
        f"- weights SHA-256: `{report.model.weights_sha256}`",
        f"- trained in run {report.model.run_id}, seed {report.model.seed}",
        f"- data: {report.data.name}, fingerprint {report.data.fingerprint}, {report.data.images} test images",
        f"- evaluated with seed {report.seed}, settings {report.settings}, "
        + ", ".join(f"{name} {value}" for name, value in report.code.items()),
        f"- report: `{folder}/report.html` among the run's artifacts",
        "",
    ]
    return lines


def _ordered(report: Report) -> list[str]:
    last = [name for name in ("worst", "autoattack") if name in report.accuracy]
    return [name for name in report.accuracy if name not in last] + last


def _shown(report: Report, name: str) -> list[str]:
    found = report.accuracy[name]
    return [percent(found.estimate), f"{percent(found.low)} to {percent(found.high)}", str(found.images)]


def _verdict(report: Report) -> str:
    if report.audit is None:
        return "**Not audited** for gradient masking."
    if report.audit.trusted:
        return f"**Trusted.** Audit for gradient masking: {report.audit.summary}."
    return f"**Not trusted.** Audit for gradient masking: {report.audit.summary}."


def _detection(report: Report) -> list[str]:
    found = report.detection
    if found is None or found.auc is None:
        return []
    text = (
        f"Misclassified images are told from correctly classified ones with an area under the ROC curve of "
        f"{percent(found.auc)} % ({percent(found.low)} to {percent(found.high)}), natural and attacked images at "
        f"{size(found.epsilon, report.threat_model.norm)} together."
    )
    return ["## Detection", "", text, ""]


def _weakest(report: Report) -> str:
    counted = [
        (share.estimate, name)
        for share, name in zip(report.accuracy["worst"].per_class, report.data.class_names, strict=True)
        if share.estimate is not None
    ]
    estimate, name = min(counted)
    return f"{name}, with {percent(estimate)} % under every attack of the table"
