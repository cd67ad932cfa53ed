"""The evidence for a registered version: its files, and the evaluation of exactly these files."""

import functools
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tla_service.attacks.autoattack import autoattack_stages
from tla_service.errors import UnavailableError, UserError, readable
from tla_service.evaluation.shards import load_outcome
from tla_service.registry.evaluations import stored_evaluations
from tla_service.registry.gate import Evaluated, Finding
from tla_service.registry.loading import PACKAGE_DIGEST, fetch_package, open_folder
from tla_service.report.schema import AUTOATTACK_FILE, OUTCOME_FILE, REPORT_FILE, ThreatModel, read_report
from tla_service.tracking.connection import retrying
from tla_service.tracking.runs import FINGERPRINT, fetch_files


class _RefusalError(UnavailableError):
    """The version's files or its evaluation, which were fetched, are not what they should be."""


@dataclass(frozen=True, eq=False)
class Package:
    """A registered version with verified files; `description` is its ``model.json``."""

    address: str
    version: str
    run_id: str
    description: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Of its weights, 64 hex digits."""
        return str(self.description["weights"]["sha256"])

    @property
    def trained_for(self) -> ThreatModel:
        """The threat model it was trained for, from its verified files: a tag can be edited."""
        return ThreatModel.model_validate(self.description["threat_model"])


def find_version(made: MlflowClient, name: str, version: str) -> ModelVersion:
    """A registered version; raises `UnavailableError` if it does not exist."""
    with readable("version", f"{name}/{version}", "check the registered models, or correct it"):
        return retrying("Reading the version", lambda: made.get_model_version(name, version))


def verify(uri: str, version: ModelVersion) -> Package:
    """Raise `UserError` unless a registered version contains what this project packaged, unmodified."""
    address = f"models:/{version.name}/{version.version}"
    if PACKAGE_DIGEST not in version.tags:
        reason = "was not registered by this project: it has no digests to compare its files with"
        raise _RefusalError("version", address, reason, "train it, or import its weights with jobs/import_model.py")
    folder, digest = fetch_package(address, uri)
    try:
        _, description = open_folder(folder, address, digest)
    except UserError as error:
        raise _RefusalError(error.subject, error.value, error.reason, error.remedy) from error
    return Package(address, str(version.version), str(version.run_id), description)


def examine_files(
    made: MlflowClient, uri: str, name: str, version: str, subject: str
) -> tuple[Finding, Package | None]:
    """The verified files of a version, with the finding for ``subject``; None if they are refused."""
    found = find_version(made, name, version)
    try:
        package = verify(uri, found)
    except _RefusalError as error:
        return Finding(f"{subject} intact", False, f"{error.reason}; {error.remedy}", error.remedy), None
    explanation = f"weights {package.sha256[:12]}, all files unmodified"
    return Finding(f"{subject} intact", True, explanation), package


def examine_evaluation(
    made: MlflowClient, package: Package, threat: ThreatModel, subject: str
) -> tuple[Finding, Evaluated | None]:
    """The evaluation of a version's weights under a threat model, with the finding; None if it is refused."""
    try:
        evaluated = _evaluated(made, package, threat)
    except _RefusalError as error:
        return Finding(f"{subject} evaluated", False, f"{error.reason}; {error.remedy}", error.remedy), None
    data = evaluated.report.data
    why = "as trained for" if threat.slug == package.trained_for.slug else f"trained for {package.trained_for}"
    explanation = f"these weights under {threat} ({why}) on {data.name}: "
    explanation += f"{evaluated.report.gate.images} of {data.images} test images are gate images"
    return Finding(f"{subject} evaluated", True, explanation), evaluated


def _evaluated(made: MlflowClient, package: Package, threat: ThreatModel) -> Evaluated:
    bad = functools.partial(_RefusalError, "version", package.address)
    sha256, run_id = package.sha256, package.run_id
    flags = "" if threat.slug == package.trained_for.slug else f" --norm {threat.norm} --epsilon {threat.radius}"
    command = f"run jobs/evaluate_tla.py --model {shlex.quote(package.address)}{flags}"
    with readable("version", package.address, "see that its run's files can be read from here"):
        try:
            stored = stored_evaluations(made, run_id, sha256)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            reason = f"the run that trained it, {run_id}, is gone, and its evaluations with it"
            raise bad(reason, "train it again, or import its weights with jobs/import_model.py") from error
    if threat.slug not in stored:
        # A slug, as the command line writes the threat model: linf 8/255.
        named = ", ".join(slug.replace("-", " ", 1).replace("_", "/") for slug in stored)
        there = f"was evaluated under {named} only" if stored else "was not evaluated"
        raise bad(f"{there}: there is no evaluation of these weights under {threat}", command)
    # The default output folder of the evaluation already exists.
    again = f"{command} --output reports/{sha256[:12]}-{threat.slug}-again"
    with tempfile.TemporaryDirectory(prefix="tla-evidence-") as scratch:
        folder = Path(scratch)
        fetch_files(made, run_id, (REPORT_FILE, OUTCOME_FILE, AUTOATTACK_FILE), folder, stored[threat.slug])
        try:
            report = read_report(folder / REPORT_FILE)
            # An earlier evaluation may have left its file there.
            is_strong = report.autoattack is not None and (folder / AUTOATTACK_FILE).is_file()
            strong = [folder / AUTOATTACK_FILE] if is_strong else []
            found = [load_outcome(path) for path in (*strong, folder / OUTCOME_FILE)]
        except UserError as error:
            raise bad(f"its evaluation cannot be used ({error.reason})", again) from error
    if report.model.weights_sha256 != sha256:
        raise bad(f"its report is about other weights ({report.model.weights_sha256[:12]}...)", again)
    if report.threat_model.slug != threat.slug:
        raise bad(f"its report is about another threat model ({report.threat_model}, not {threat})", again)
    classes, (_, rows, _) = len(package.description["class_names"]), package.description["image_shape"]
    stages, _ = autoattack_stages(classes, threat.norm, rows)
    outcomes = {name: outcome for outcome in found for name in outcome.broken_at}
    trained_on = package.description.get("facts", {}).get(FINGERPRINT)
    return Evaluated(package.version, report, outcomes, trained_on, tuple(stages), again)
