"""What a registered version can show for itself: its files, and the evaluation of exactly these files."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tla_service.errors import UnavailableError, UserError
from tla_service.evaluation.outcomes import ShardOutcome, load_outcome
from tla_service.registry.connection import one_line, retrying
from tla_service.registry.gate import Evaluated, Finding, refused
from tla_service.registry.loading import PACKAGE_DIGEST, open_package
from tla_service.report.schema import AUTOATTACK_FILE, REPORT_FILE, Report, artifact_folder, read_report

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def examine(
    made: "MlflowClient", uri: str, name: str, version: str, *, subject: str = "version"
) -> tuple[list[Finding], Evaluated | None]:
    """Look at a version's files and at its evaluation.

    Args:
        made: Client of the registry.
        uri: Tracking store.
        name: Registered model.
        version: Its number.
        subject: What rules call it.

    Returns:
        What was found, and the evaluation, unless something refuses it.

    Raises:
        UnavailableError: There is no such version, or the server is away.
    """
    found = find_version(made, name, version)
    try:
        sha256 = check_files(uri, found)
    except UserError as error:
        return [refused(f"{subject} intact", error)], None
    intact = Finding(f"{subject} intact", passed=True, explanation=f"weights {sha256[:12]}, no pickle, nothing changed")
    try:
        report, outcomes = _evaluation(made, found, sha256)
    except UserError as error:
        return [intact, refused(f"{subject} evaluated", error)], None
    explanation = f"these very weights, on {report.data.images} test images of {report.data.name}"
    evaluated = Finding(f"{subject} evaluated", passed=True, explanation=explanation)
    return [intact, evaluated], Evaluated(version, report, outcomes)


def find_version(made: "MlflowClient", name: str, version: str) -> "ModelVersion":
    """A registered version.

    Raises:
        UnavailableError: There is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        return retrying("Reading the version", lambda: made.get_model_version(name, version))
    except MlflowException as error:
        subject, remedy = f"{name}/{version}", "look at the registered models, or correct model and version"
        raise UnavailableError("version", subject, f"there is none ({one_line(error)})", remedy) from error


def check_files(uri: str, version: "ModelVersion") -> str:
    """Make sure that a version holds what was packaged here, and return the SHA-256 of its weights.

    Raises:
        UserError: It is not a model of this project, or it was changed.
    """
    address = f"models:/{version.name}/{version.version}"
    if PACKAGE_DIGEST not in version.tags or "weights_sha256" not in version.tags:
        reason = "was not registered by this project: it has no digests to compare its files with"
        raise UnavailableError("version", address, reason, "train it, or import its weights with jobs/import_model.py")
    _, description = open_package(address, uri)
    sha256 = str(description["weights"]["sha256"])  # compared with the file when the package was opened
    if sha256 != version.tags["weights_sha256"]:
        reason = f"its weights are {sha256[:12]}..., registered were {version.tags['weights_sha256'][:12]}..."
        raise UnavailableError("version", address, reason, "register the model again")
    return sha256


def _evaluation(made: "MlflowClient", version: "ModelVersion", sha256: str) -> tuple[Report, dict[str, ShardOutcome]]:
    """The report on these weights, and each image's fate by attack.

    Raises:
        UserError: There is none, it is damaged, or it is about other weights.
    """
    address = f"models:/{version.name}/{version.version}"
    remedy, run_id = f"run jobs/evaluate_tla.py --model {address}", str(version.run_id)
    with tempfile.TemporaryDirectory(prefix="tla-evidence-") as scratch:
        try:
            path = artifact_folder(sha256)
            folder = Path(retrying("Fetching the report", lambda: made.download_artifacts(run_id, path, scratch)))
        except UnavailableError:
            raise
        except Exception as error:
            reason = f"was not evaluated: its run has no {artifact_folder(sha256)}"
            raise UnavailableError("version", address, reason, remedy) from error
        report = read_report(folder / REPORT_FILE)
        outcomes = _fates(folder, report)
    if report.model.weights_sha256 != sha256:
        reason = f"its report is about other weights ({report.model.weights_sha256[:12]}...)"
        raise UnavailableError("version", address, reason, remedy)
    return report, outcomes


def _fates(folder: Path, report: Report) -> dict[str, ShardOutcome]:
    outcomes: dict[str, ShardOutcome] = {}
    files = [folder / Path(report.outcome).name, folder / AUTOATTACK_FILE]
    for path in [files[0], *(path for path in files[1:] if path.is_file())]:
        outcome = load_outcome(path)
        outcomes |= dict.fromkeys(outcome.broken_at, outcome) | outcomes
    return outcomes
