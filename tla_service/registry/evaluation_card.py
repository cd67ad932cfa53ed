"""The model card of an evaluated version, as the registry shows it: what it withstands, and what it is not for."""

from tla_service.report.page import describe, markdown_table, percent, size
from tla_service.report.schema import Report, artifact_folder

_NORMS = {"linf": "L-infinity", "l2": "L2"}


def evaluation_card(report: Report) -> str:
    """Write the card in Markdown."""
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
        "## Accuracy on the test set, %",
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
        f"- report: `{artifact_folder(report.model.weights_sha256)}/report.html` among the run's artifacts",
        "",
    ]
    return "\n".join(lines)


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
