"""What a registered version can show for itself: its files, and the evaluation of exactly these files."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tla_service.attacks.autoattack import autoattack_stages
from tla_service.data.splits import gate_images
from tla_service.errors import UnavailableError, UserError
from tla_service.evaluation.outcomes import AutoAttackRun, ShardOutcome, load_outcome
from tla_service.registry.evaluations import described, evaluate_command, fetch, stored_evaluations
from tla_service.registry.gate import Evaluated, Finding, refused
from tla_service.registry.loading import PACKAGE_DIGEST, open_package
from tla_service.report.schema import AUTOATTACK_FILE, OUTCOME_FILE, REPORT_FILE, Report, ThreatModel, read_report
from tla_service.tracking.connection import one_line, retrying

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Package:
    """A registered version whose files are intact.

    Attributes:
        version: As the registry has it.
        description: Its ``model.json``.
    """

    version: "ModelVersion"
    description: Mapping[str, Any]

    @property
    def address(self) -> str:
        """``models:/NAME/VERSION``."""
        return f"models:/{self.version.name}/{self.version.version}"

    @property
    def sha256(self) -> str:
        """Of its weights, 64 hex digits."""
        return str(self.description["weights"]["sha256"])

    @property
    def trained_for(self) -> ThreatModel:
        """The threat model it was trained for, by its files: their digests were compared, a tag can be edited."""
        return ThreatModel.model_validate(self.description["threat_model"])


def examine_files(
    made: "MlflowClient", uri: str, name: str, version: str, *, subject: str = "version"
) -> tuple[Finding, Package | None]:
    """Look at a version's files.

    Args:
        made: Client of the registry.
        uri: Tracking store.
        name: Registered model.
        version: Its number.
        subject: What rules call it.

    Returns:
        What was found, and the files, unless something refuses them.

    Raises:
        UnavailableError: There is no such version, or the server is away.
    """
    found = find_version(made, name, version)
    try:
        package = Package(found, check_files(uri, found))
    except UserError as error:
        return refused(f"{subject} intact", error), None
    explanation = f"weights {package.sha256[:12]}, no pickle, nothing changed"
    return Finding(f"{subject} intact", passed=True, explanation=explanation), package


def examine_evaluation(
    made: "MlflowClient", package: Package, threat: ThreatModel, *, subject: str = "version"
) -> tuple[Finding, Evaluated | None]:
    """Look at the evaluation of a version under a threat model.

    Args:
        made: Client of the registry.
        package: The version.
        threat: The threat model.
        subject: What rules call it.

    Returns:
        What was found, and the evaluation, unless something refuses it.

    Raises:
        UnavailableError: The server is away.
    """
    try:
        evaluated = _evaluated(made, package, threat)
    except UserError as error:
        return refused(f"{subject} evaluated", error), None
    trained_for, report = package.trained_for, evaluated.report
    why = "which it was trained for" if threat.slug == trained_for.slug else f"trained for {trained_for}"
    explanation = (
        f"these very weights, under {threat} ({why}), on {report.data.name}: {evaluated.gate_images} of "
        f"{report.data.images} test images are set aside for the gate"
    )
    if report.gate is None:
        explanation += "; evaluated before images were set aside, so that its published figures are of all of them"
    return Finding(f"{subject} evaluated", passed=True, explanation=explanation), evaluated


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


def check_files(uri: str, version: "ModelVersion") -> Mapping[str, Any]:
    """Make sure that a version holds what was packaged here, and return its ``model.json``.

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
    return description


def _evaluated(made: "MlflowClient", package: Package, threat: ThreatModel) -> Evaluated:
    """The evaluation of a version's weights under a threat model.

    Raises:
        UserError: There is none, it is damaged, or it is about other weights.
    """
    address, sha256, run_id = package.address, package.sha256, str(package.version.run_id)
    command = evaluate_command(address, threat, package.trained_for)
    try:
        stored = stored_evaluations(made, run_id, sha256)
    except UserError:
        raise
    except Exception as error:
        reason = f"the run that trained it cannot be read ({one_line(error)})"
        raise UnavailableError("version", address, reason, "register the model again") from error
    if threat.slug not in stored:
        there = f"was evaluated under {', '.join(map(described, stored))} only" if stored else "was not evaluated"
        reason = f"{there}: there is no evaluation of these weights under {threat}"
        raise UnavailableError("version", address, reason, f"run {command}")
    # The default folder of the evaluation is taken by the one that is there.
    again = f"run {command} --output reports/{sha256[:12]}-{threat.slug}-again"
    with tempfile.TemporaryDirectory(prefix="tla-evidence-") as scratch:
        try:
            files = [REPORT_FILE, OUTCOME_FILE, AUTOATTACK_FILE]
            fetch(made, run_id, stored[threat.slug], Path(scratch), files)
            report = read_report(Path(scratch) / REPORT_FILE)
            outcomes = _outcomes(Path(scratch), report)
        except UserError as error:
            raise UnavailableError(
                "version", address, f"its evaluation cannot be used ({error.reason})", again
            ) from error
    if report.model.weights_sha256 != sha256:
        reason = f"its report is about other weights ({report.model.weights_sha256[:12]}...)"
        raise UnavailableError("version", address, reason, again)
    if report.threat_model.slug != threat.slug:
        reason = f"its report is about another threat model ({report.threat_model}, not {threat})"
        raise UnavailableError("version", address, reason, again)
    classes, (_, rows, _) = len(package.description["class_names"]), package.description["image_shape"]
    stages, _ = autoattack_stages(classes, threat.norm, rows)
    return Evaluated(str(package.version.version), report, outcomes, tuple(stages), again)


def _outcomes(folder: Path, report: Report) -> dict[str, ShardOutcome]:
    """The result of each image by attack, with the images set aside for the gate marked.

    Raises:
        UnavailableError: A file is missing or damaged, or it cannot be told which images are set aside.
    """
    paths = [folder / OUTCOME_FILE, folder / AUTOATTACK_FILE]
    found = [load_outcome(path) for path in paths if path == paths[0] or path.is_file()]
    if any(outcome.gate is None for outcome in found):
        whole = found[0]
        # Which images are set aside follows from the labels of the whole test set.
        if not np.array_equal(whole.indices, np.arange(report.data.images)):
            reason = (
                f"made before images were set aside for the gate, on {len(whole.indices)} of {report.data.images} "
                "test images, which do not tell which ones are"
            )
            raise UnavailableError("evaluation", folder.name, reason, "evaluate the model again")
        gate = gate_images(torch.from_numpy(whole.labels)).numpy()
        found = [replace(outcome, gate=gate[outcome.indices]) for outcome in found]
    if report.autoattack is not None:
        # Versions that did not record how AutoAttack was run, ran it under the report's threat model.
        threat, facts = report.threat_model, report.autoattack
        run = AutoAttackRun(facts.version, threat.norm, threat.epsilon, facts.stages)
        found = [
            replace(outcome, autoattack=run)
            if "autoattack" in outcome.broken_at and outcome.autoattack is None
            else outcome
            for outcome in found
        ]
    return {name: outcome for outcome in reversed(found) for name in outcome.broken_at}
