"""Evaluations among the artifacts of the run that trained the model: a folder per weights and threat model."""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tla_service.errors import UnavailableError, UserError, one_line
from tla_service.report.schema import REPORT_FILE, Report, ThreatModel, evaluations_folder, read_report
from tla_service.tracking.connection import retrying

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NORMS = ("linf-", "l2-")


def stored_evaluations(made: "MlflowClient", run_id: str, weights_sha256: str) -> dict[str, str]:
    """The folder of each evaluation of these weights, by the slug of its threat model.

    Earlier versions kept one evaluation, in the folder above: it is listed under its own threat model, unless that was
    evaluated again since.

    Args:
        made: Client of the tracking store.
        run_id: Run that trained the weights.
        weights_sha256: Of the weights file, 64 hex digits.

    Raises:
        UnavailableError: The server is away.
    """
    home = evaluations_folder(weights_sha256)
    names = _names(made, run_id, home)
    found = {name: f"{home}/{name}" for name in sorted(names) if name.startswith(_NORMS)}
    earlier = _report(made, run_id, home) if REPORT_FILE in names else None
    return found if earlier is None else {earlier.threat_model.slug: home} | found


def _report(made: "MlflowClient", run_id: str, folder: str) -> Report | None:
    """The report in a folder of the run's artifacts; None where it cannot be read."""
    with tempfile.TemporaryDirectory(prefix="tla-evaluation-") as scratch:
        fetch(made, run_id, folder, Path(scratch), [REPORT_FILE])
        with contextlib.suppress(UnavailableError):
            return read_report(Path(scratch) / REPORT_FILE)
    return None


def fetch(made: "MlflowClient", run_id: str, folder: str, target: Path, wanted: Sequence[str]) -> None:
    """Copy files of an evaluation into a local folder, those of the names that it has.

    Raises:
        UnavailableError: The server is away, or a file cannot be fetched.
    """
    for name in sorted(_names(made, run_id, folder) & set(wanted)):
        path = f"{folder}/{name}"
        try:
            download = functools.partial(made.download_artifacts, run_id, path, str(target))
            fetched = Path(retrying(f"Fetching {name}", download))
            if fetched != target / name:
                shutil.copyfile(fetched, target / name)
        except UserError:
            raise
        except Exception as error:
            remedy = "see that the run's files can be read from here, and what the tracking store's log says"
            raise UnavailableError("evaluation", path, f"cannot be fetched ({one_line(error)})", remedy) from error


def other_reports(made: "MlflowClient", run_id: str, report: Report) -> dict[str, Report]:
    """Readable reports on the same weights under other threat models, by their folders."""
    found = {}
    for slug, folder in stored_evaluations(made, run_id, report.model.weights_sha256).items():
        other = None if slug == report.threat_model.slug else _report(made, run_id, folder)
        if other is not None and other.model.weights_sha256 == report.model.weights_sha256:
            found[folder] = other
    return found


def described(slug: str) -> str:
    """A slug as the command line writes the threat model: ``linf 8/255``."""
    return slug.replace("-", " ", 1).replace("_", "/")


def evaluate_command(model: str, asked: ThreatModel, trained_for: ThreatModel) -> str:
    """The command that evaluates a model under a threat model.

    Args:
        model: Its address.
        asked: The threat model.
        trained_for: The one that the job takes by itself.
    """
    flags = "" if asked.slug == trained_for.slug else f" --norm {asked.norm} --epsilon {asked.radius}"
    return f"jobs/evaluate_tla.py --model {model}{flags}"


def _names(made: "MlflowClient", run_id: str, folder: str) -> set[str]:
    listed = retrying("Listing evaluations", lambda: made.list_artifacts(run_id, folder))
    return {str(artifact.path).rpartition("/")[2] for artifact in listed}
