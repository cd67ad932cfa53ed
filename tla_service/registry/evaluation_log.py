"""Where an evaluation goes in MLflow: files and metrics with the run, tags and card with the registered versions."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tla_service.registry.evaluation_card import evaluation_card
from tla_service.registry.evaluations import other_reports
from tla_service.report.schema import PAGE_FILE, Report, artifact_folder
from tla_service.tracking.connection import client, storing
from tla_service.tracking.runs import log_files

if TYPE_CHECKING:
    from mlflow import MlflowClient


def log_evaluation(uri: str, report: Report, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Log a report to the run that trained its model, and tag every registered version of these weights.

    Repeating it changes nothing. Another evaluation of the same weights under the same threat model replaces what an
    earlier one left; evaluations under other threat models stay.

    Args:
        uri: Tracking store.
        report: With `model.run_id`.
        files: Name below the report's artifact folder -> local file; the page among them.

    Returns:
        The versions that were tagged, as ``NAME/VERSION``.

    Raises:
        UnavailableError: The server is away.
    """
    run_id = report.model.run_id
    assert run_id is not None
    folder = artifact_folder(report.model.weights_sha256, report.threat_model)
    log_files(uri, run_id, {f"{folder}/{name}": path for name, path in files.items()})
    made = client(uri)
    # Metrics are of the time when the page was written: MLflow keeps one of several that are alike.
    written = int(files[PAGE_FILE].stat().st_mtime * 1000)
    storing("Logging the figures", lambda: _log_metrics(made, run_id, report, written))
    versions = storing("Finding versions", lambda: _versions(made, report))
    others = storing("Reading reports", lambda: other_reports(made, run_id, report)) if versions else {}
    card = evaluation_card(report, others) if versions else ""
    for name, version in versions:
        storing("Tagging the version", functools.partial(_describe, made, name, version, report, card))
    return tuple(f"{name}/{version}" for name, version in versions)


def evaluation_tags(report: Report) -> dict[str, str]:
    """Tags of a registered version that summarise its evaluation.

    Each threat model has tags of its own, ``tla.evaluation.SLUG.NAME``. The one that the version was trained for has
    the short ones, ``tla.NAME``, as well.
    """
    facts = {
        "report": artifact_folder(report.model.weights_sha256, report.threat_model),
        "evaluated_on": report.data.fingerprint,
        "audit.trusted": "not run" if report.audit is None else str(report.audit.trusted).lower(),
    }
    shown = ("clean", "worst", "autoattack")
    estimates = {name: report.accuracy[name].estimate for name in shown if name in report.accuracy}
    facts |= {f"accuracy.{name}": f"{value:.6f}" for name, value in estimates.items() if value is not None}
    if report.detection is not None and report.detection.auc is not None:
        facts["detection.auc"] = f"{report.detection.auc:.6f}"
    tags = {"tla.weights_sha256": report.model.weights_sha256}
    tags |= {f"tla.evaluation.{report.threat_model.slug}.{name}": value for name, value in facts.items()}
    return tags | ({f"tla.{name}": value for name, value in facts.items()} if report.is_as_trained else {})


def _versions(made: "MlflowClient", report: Report) -> list[tuple[str, str]]:
    """Registered versions of the run whose weights are the evaluated ones."""
    found = made.search_model_versions(f"run_id='{report.model.run_id}'")
    sha256 = report.model.weights_sha256
    return [(each.name, str(each.version)) for each in found if each.tags.get("weights_sha256") == sha256]


def _describe(made: "MlflowClient", name: str, version: str, report: Report, card: str) -> None:
    for key, value in evaluation_tags(report).items():
        made.set_model_version_tag(name, version, key, value)
    made.update_model_version(name, version, description=card)


def _log_metrics(made: "MlflowClient", run_id: str, report: Report, milliseconds: int) -> None:
    from mlflow.entities import Metric

    values = {f"accuracy/{name}": found.estimate for name, found in report.accuracy.items()}
    if report.detection is not None:
        values["detection_auc"] = report.detection.auc
    if report.neighbours is not None:
        values["neighbours/clean"] = report.neighbours.clean.estimate
        values["neighbours/attacked"] = report.neighbours.attacked.estimate
    if report.audit is not None:
        values["audit_trusted"] = float(report.audit.trusted)
    values = {f"evaluation/{report.threat_model.slug}/{name}": value for name, value in values.items()} | (
        {f"evaluation/{name}": value for name, value in values.items()} if report.is_as_trained else {}
    )
    metrics = [Metric(name, value, milliseconds, 0) for name, value in values.items() if value is not None]
    made.log_batch(run_id, metrics=metrics)
