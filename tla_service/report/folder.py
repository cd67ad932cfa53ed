"""The folder of a report: which evaluation it belongs to, and whether that may resume there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tla_service.errors import ConfigError, UnavailableError, one_line
from tla_service.files import LOCK_FILE, write_whole
from tla_service.report.plan import Plan, protocol
from tla_service.report.schema import PAGE_FILE, REPORT_FILE, ThreatModel
from tla_service.report.settings import ReportSettings
from tla_service.report.subjects import Models

_IDENTITY = "evaluation.json"


def report_folder(settings: ReportSettings, models: Models, plan: Plan) -> Path:
    """Where the report goes: given, or named after the weights, and the threat model if it is not that of training."""
    subject = models.subject
    threat = ThreatModel(norm=plan.norm, epsilon=plan.epsilon)
    name = subject.key if threat.slug == subject.threat_model.slug else f"{subject.key}-{threat.slug}"
    return (settings.output or Path("reports") / name).expanduser().absolute()


def identity(settings: ReportSettings, models: Models, plan: Plan) -> dict[str, Any]:
    """What makes two evaluations the same one: weights, data and protocol, whatever the models' addresses."""
    surrogate = models.surrogate.facts.weights_sha256 if models.surrogate is not None else None
    return {
        "weights": [each.facts.weights_sha256 for each in models.all],
        "surrogate": surrogate,
        "data": models.dataset.fingerprint,
        "threat model": f"{plan.norm} {plan.epsilon!r}",
        "settings": protocol(plan, settings),
    }


def open_folder(output: Path, mine: Mapping[str, Any], *, page: bool = True) -> bool:
    """Claim the folder of a report, which is made if it is missing.

    Returns:
        Whether the same evaluation has finished there, including its page if `page` is set.

    Raises:
        ConfigError: It holds another evaluation, or other files.
        UnavailableError: It cannot be written.
    """
    mark = output / _IDENTITY
    try:
        if output.exists() and not mark.is_file() and any(path.name != LOCK_FILE for path in output.iterdir()):
            raise ConfigError("output", output, "holds other files", "choose another --output")
        if mark.is_file():
            found = json.loads(mark.read_text())
            differ = [name for name, value in mine.items() if found.get(name) != value]
            if differ:
                reason = f"holds an evaluation that differs in {', '.join(differ)}"
                raise ConfigError("output", output, reason, "choose another --output, or delete it")
        output.mkdir(parents=True, exist_ok=True)
        write_whole(mark, json.dumps(mine, indent=1))
    except (OSError, ValueError) as error:
        reason = f"cannot be written ({one_line(error)})"
        raise UnavailableError("output", output, reason, "choose another --output") from error
    return (output / (PAGE_FILE if page else REPORT_FILE)).is_file()
