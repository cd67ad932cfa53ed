"""Evaluations in MLflow: files and metrics with the run that trained the model, tags and card with its versions.

Files are in a folder per weights and threat model.
"""

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.entities.model_registry import ModelVersion

from tla_service.errors import UnavailableError
from tla_service.report.page import NORMS, describe, percent, split_sentence, template
from tla_service.report.schema import REPORT_FILE, Report, artifact_folder, evaluations_folder, read_report
from tla_service.tracking.connection import client, retrying, storing
from tla_service.tracking.runs import fetch_files, log_files

_NORMS = ("linf-", "l2-")
_LONGEST = 5000  # MLflow's column for a version's description
_SHOWN = ("clean", "worst", "autoattack")
_FIGURES = (*(f"accuracy.{name}" for name in _SHOWN), "detection.auc", "detection.adaptive_auc")


def log_evaluation(uri: str, report: Report, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Log a report to the run that trained its model, and tag every registered version of these weights.

    Repeating it changes nothing. It replaces figures, tags and files of an earlier evaluation of the same weights under
    the same threat model; a file that only the earlier one has stays.
    `files` maps names below the report's artifact folder to local files, `report.json` among them.

    Returns the versions that were tagged, as ``NAME/VERSION``.
    """
    run_id, sha256 = report.model.run_id, report.model.weights_sha256
    assert run_id is not None
    folder = artifact_folder(sha256, report.threat_model)
    log_files(uri, run_id, {f"{folder}/{name}": path for name, path in files.items()})
    made = client(uri)
    # Metrics are of the time when the report was written: MLflow keeps one of several that are alike.
    written = int(files[REPORT_FILE].stat().st_mtime * 1000)
    storing("Logging the figures", lambda: _log_metrics(made, run_id, report, written))
    found = storing("Finding versions", lambda: made.search_model_versions(f"run_id='{run_id}'"))
    versions = [each for each in found if each.tags.get("weights_sha256") == sha256]
    stored = storing("Reading reports", lambda: stored_reports(made, run_id, sha256)) if versions else {}
    stored.pop(folder, None)
    others = {at: other for at, other in stored.items() if other is not None and other.model.weights_sha256 == sha256}
    for version in versions:
        card = evaluation_card(report, others)
        storing("Tagging the version", partial(_tag_version, made, version, report, card))
    return tuple(f"{each.name}/{each.version}" for each in versions)


def evaluation_tags(report: Report) -> dict[str, str]:
    """Tags of a version: ``tla.evaluation.SLUG.NAME``, and ``tla.NAME`` for the threat model it was trained for."""
    facts = {
        "report": artifact_folder(report.model.weights_sha256, report.threat_model),
        "evaluated_on": report.data.fingerprint,
        "audit.trusted": "not run" if report.audit is None else str(report.audit.trusted).lower(),
    }
    numbers = {f"accuracy.{name}": report.accuracy[name].estimate for name in _SHOWN if name in report.accuracy}
    if report.detection is not None:
        numbers["detection.auc"] = report.detection.auc
        attacked = report.detection.attacked
        numbers["detection.adaptive_auc"] = None if attacked is None else attacked.auc
    facts |= {name: f"{value:.6f}" for name, value in numbers.items() if value is not None}
    tags = {"tla.weights_sha256": report.model.weights_sha256}
    tags |= {f"tla.evaluation.{report.threat_model.slug}.{name}": value for name, value in facts.items()}
    return tags | ({f"tla.{name}": value for name, value in facts.items()} if report.is_as_trained else {})


def evaluation_card(report: Report, others: Mapping[str, Report]) -> str:
    """The card of a version in Markdown: in full for the threat model it was trained for, a line for each other one.

    `others` are reports on the same weights, by their folders among the run's artifacts.
    """
    reports = {artifact_folder(report.model.weights_sha256, report.threat_model): report, **others}
    main = next((folder for folder, each in reports.items() if each.is_as_trained), next(iter(reports)))
    about = reports.pop(main)
    rows = [_row(folder, each) for folder, each in sorted(reports.items())]
    for left_out in range(len(rows) + 1):
        text = _card(about, main, rows[: len(rows) - left_out], left_out)
        if len(text) <= _LONGEST:
            break
    return text


def stored_evaluations(made: MlflowClient, run_id: str, weights_sha256: str) -> dict[str, str]:
    """The folder of each evaluation of these weights in the run that trained them, by the slug of its threat model."""
    home = evaluations_folder(weights_sha256)
    listed = retrying("Listing evaluations", lambda: made.list_artifacts(run_id, home))
    names = sorted(str(artifact.path).rpartition("/")[2] for artifact in listed)
    return {name: f"{home}/{name}" for name in names if name.startswith(_NORMS)}


def stored_reports(made: MlflowClient, run_id: str, weights_sha256: str) -> dict[str, Report | None]:
    """The report of each stored evaluation of these weights, by its folder; None if it cannot be read."""
    found: dict[str, Report | None] = {}
    for folder in stored_evaluations(made, run_id, weights_sha256).values():
        with tempfile.TemporaryDirectory(prefix="tla-evaluation-") as scratch:
            fetch_files(made, run_id, [REPORT_FILE], Path(scratch), folder)
            try:
                found[folder] = read_report(Path(scratch) / REPORT_FILE)
            except UnavailableError:
                found[folder] = None
    return found


def _card(report: Report, folder: str, rows: list[str], left_out: int) -> str:
    last = [name for name in ("worst", "autoattack") if name in report.accuracy]
    by_class = zip(report.accuracy["worst"].per_class, report.data.class_names, strict=False)
    text = template("card.md.j2").render(
        report=report,
        folder=folder,
        attacks=[name for name in report.accuracy if name not in last] + last,
        describe=lambda name: describe(report, name),
        norm=NORMS[report.threat_model.norm],
        split=split_sentence(report),
        weakest=min(((share.estimate, name) for share, name in by_class if share.estimate is not None), default=None),
        rows=rows,
        shown=_SHOWN,
        left_out=left_out,
    )
    return f"{text.rstrip()}\n"


def _row(folder: str, report: Report) -> str:
    estimates = [percent(report.accuracy[name].estimate if name in report.accuracy else None) for name in _SHOWN]
    audit = "not run" if report.audit is None else "trusted" if report.audit.trusted else "not trusted"
    return f"| {' | '.join([str(report.threat_model), *estimates, audit, f'`{folder}`'])} |"


def _tag_version(made: MlflowClient, version: ModelVersion, report: Report, card: str) -> None:
    tags = evaluation_tags(report)
    for key, value in tags.items():
        made.set_model_version_tag(version.name, version.version, key, value)
    # Figures of an earlier evaluation that this one does not have.
    homes = [f"tla.evaluation.{report.threat_model.slug}", *(["tla"] if report.is_as_trained else [])]
    for key in {f"{home}.{name}" for home in homes for name in _FIGURES} & version.tags.keys() - tags.keys():
        made.delete_model_version_tag(version.name, version.version, key)
    made.update_model_version(version.name, version.version, description=card)


def _log_metrics(made: MlflowClient, run_id: str, report: Report, milliseconds: int) -> None:
    values = {f"accuracy/{name}": found.estimate for name, found in report.accuracy.items()}
    if report.detection is not None:
        values["detection_auc"] = report.detection.auc
        attacked = report.detection.attacked
        values["detection_adaptive_auc"] = None if attacked is None else attacked.auc
    if report.neighbours is not None:
        values["neighbours/clean"] = report.neighbours.clean.estimate
        values["neighbours/attacked"] = report.neighbours.attacked.estimate
    if report.audit is not None:
        values["audit_trusted"] = float(report.audit.trusted)
    homes = [f"evaluation/{report.threat_model.slug}", *(["evaluation"] if report.is_as_trained else [])]
    named = {f"{home}/{name}": value for home in homes for name, value in values.items() if value is not None}
    source = json.dumps({"split": report.data.split, "images": report.data.images})
    dataset = Dataset(report.data.name, report.data.fingerprint, "local", source)
    made.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])
    # With a model's id they are its metrics too, by which MLflow's page of models compares versions on a data set.
    chosen = f"source_run_id='{run_id}' AND tags.weights_sha256='{report.model.weights_sha256}'"
    experiment = made.get_run(run_id).info.experiment_id
    found = made.search_logged_models([experiment], filter_string=chosen)
    models: list[str | None] = [model.model_id for model in found]
    for model_id in models or [None]:
        about = milliseconds, 0, model_id, dataset.name, dataset.digest
        made.log_batch(run_id, metrics=[Metric(name, value, *about) for name, value in named.items()])
