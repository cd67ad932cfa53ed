"""The leaderboard: every evaluation of every registered version on one page, from what MLflow holds alone."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import RunInfo
from mlflow.exceptions import MlflowException

from tla_service.config import TrackingConfig
from tla_service.config.explain import suggest
from tla_service.data.cache import disk_trouble
from tla_service.errors import UnavailableError, one_line, readable, without_credentials
from tla_service.files import expanded, write_whole
from tla_service.registry.evaluations import stored_reports
from tla_service.registry.lock import OWNER
from tla_service.report.page import NORMS, method_name, template
from tla_service.report.schema import PAGE_FILE, Report
from tla_service.tracking.connection import client, existing_store, retrying, search_all


@dataclass(frozen=True)
class Entry:
    """A registered version under one threat model; `report` is None if it has no evaluation that can be read.

    `trouble` says why then. `links` are addresses of the version, its run and the report's page, as far as there are
    any. `rank` is among evaluations on the same data under the same threat model, from 1; None without AutoAttack, or
    if the audit failed.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    method: str
    registered: str
    run_id: str
    links: dict[str, str]
    report: Report | None = None
    trouble: str = ""
    rank: int | None = None

    @property
    def autoattack(self) -> float | None:
        """Accuracy under AutoAttack, in [0, 1]."""
        found = self.report.accuracy.get("autoattack") if self.report is not None else None
        return None if found is None else found.estimate

    @property
    def audit(self) -> str:
        """The audit's verdict."""
        if self.report is None or self.report.audit is None:
            return "not run"
        return "passed" if self.report.audit.trusted else "failed"

    @property
    def group(self) -> tuple[str, ...]:
        """What makes figures comparable: data set and threat model."""
        assert self.report is not None
        return self.report.data.name, self.report.data.fingerprint, self.report.threat_model.slug


@dataclass(frozen=True)
class Leaderboard:
    """Entries in the order of the page; `foreign` counts versions that this project did not register, left out."""

    models: tuple[str, ...]
    versions: int
    foreign: int
    entries: tuple[Entry, ...]


def read_leaderboard(tracking: TrackingConfig, models: Sequence[str] = ()) -> Leaderboard:
    """Read the registered versions of some models, or of all, with their evaluations; nothing is written.

    UnavailableError if the store cannot be read, a model is not registered, or none is.
    """
    uri = existing_store(tracking)
    made = client(uri)
    with readable("tracking.uri", uri, "correct the address"):
        found = retrying("Reading the models", lambda: search_all(made.search_registered_models))
    # The locks of promotions are registered models, too.
    registered = {each.name: each for each in found if OWNER not in each.tags}
    if not registered:
        raise UnavailableError("tracking.uri", uri, "has no registered models", "train one, or correct the address")
    missing = next((name for name in models if name not in registered), None)
    if missing is not None:
        raise UnavailableError("models", missing, "is not registered", suggest(missing, sorted(registered)))
    # Without a filter, which cannot name a model with a quote in its name.
    versions = retrying("Reading the versions", lambda: search_all(made.search_model_versions))
    shown = set(models) or registered
    wanted = [version for version in versions if version.name in shown]
    own = [version for version in wanted if "weights_sha256" in version.tags]
    read = functools.cache(functools.partial(_read, made))
    entries: list[Entry] = []
    for version in own:
        aliases = registered[version.name].aliases.items()
        carried = sorted(alias for alias, number in aliases if str(number) == str(version.version))
        entries += _entries(version, tuple(carried), without_credentials(uri), read)
    names, foreign = sorted({entry.name for entry in entries}), len(wanted) - len(own)
    return Leaderboard(tuple(names), len(own), foreign, _ranked(entries))


def write_leaderboard(found: Leaderboard, path: Path) -> Path:
    """Write the page; returns its absolute path. UnavailableError if it cannot be written."""
    path = expanded("output", path).absolute()
    rows = [(entry, _data(entry, found.entries), _threat(entry)) for entry in found.entries]
    content = template("leaderboard.html.j2").render(
        found=found,
        rows=rows,
        data=sorted({data for _, data, _ in rows if data}),
        threats=sorted({threat for _, _, threat in rows if threat}),
        method=method_name,
        evaluated=sum(entry.report is not None for entry in found.entries),
    )
    with disk_trouble("output", path, "choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return path


def _read(made: MlflowClient, run_id: str, sha256: str) -> tuple[RunInfo, Mapping[str, Report | None]] | str:
    """A run with the reports on these weights, or why it cannot be read; UnavailableError if the server is why."""
    try:
        return retrying("Reading the run", lambda: made.get_run(run_id)).info, stored_reports(made, run_id, sha256)
    except (MlflowException, UnavailableError) as error:
        retrying("Reading the models", lambda: made.search_registered_models(max_results=1))
        return f"its run cannot be read ({one_line(error)})"


def _entries(
    version: Any,
    aliases: tuple[str, ...],
    base: str,
    read: Callable[[str, str], tuple[RunInfo, Mapping[str, Report | None]] | str],
) -> list[Entry]:
    """An entry for each evaluation of a version in the store at `base`, or one that says why there is none."""
    run_id, sha256 = str(version.run_id or ""), version.tags["weights_sha256"]
    registered = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).date().isoformat()
    links = {}
    if base.startswith(("http://", "https://")):
        links["version"] = f"{base}/#/models/{quote(version.name, safe='')}/versions/{version.version}"
    bare = Entry(version.name, str(version.version), aliases, version.tags.get("method", ""), registered, run_id, links)
    found = read(run_id, sha256)
    if isinstance(found, str):
        return [replace(bare, trouble=found)]
    run, reports = found
    if "version" in links:
        links["run"] = f"{base}/#/experiments/{run.experiment_id}/runs/{run_id}"
    if not reports:
        return [replace(bare, trouble="not evaluated")]
    entries = []
    for folder, report in reports.items():
        if report is None:
            entries.append(replace(bare, trouble=f"the report in {folder} cannot be read"))
        elif report.model.weights_sha256 != sha256:
            entries.append(replace(bare, trouble="the report is of other weights"))
        else:
            page = _page(run, folder, links.get("run"))
            entries.append(replace(bare, report=report, links=links | ({"report": page} if page else {})))
    return entries


def _page(run: RunInfo, folder: str, address: str | None) -> str | None:
    """Where a report's page can be looked at: in MLflow's UI, or on this machine's disk."""
    if address is not None:
        return f"{address}/artifacts/{folder}/{PAGE_FILE}"
    root = urlsplit(str(run.artifact_uri))
    path = Path(unquote(root.path)) / folder / PAGE_FILE
    return path.as_uri() if root.scheme in ("", "file") and path.is_file() else None


def _ranked(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Evaluations by data set and threat model, those with most first; in each, the best under AutoAttack on top.

    Those without AutoAttack follow, then those whose audit failed, and at the very end what has no evaluation.
    """
    sizes = Counter(entry.group for entry in entries if entry.report is not None)

    def place(entry: Entry) -> tuple[Any, ...]:
        identity = entry.name, int(entry.version)
        if entry.report is None:
            return 1, *identity
        accuracy = 1.0 if entry.autoattack is None else -entry.autoattack
        return 0, -sizes[entry.group], *entry.group, entry.audit == "failed", accuracy, *identity

    ranked, counts = [], defaultdict[tuple[str, ...], list[float]](list)
    for entry in sorted(entries, key=place):
        rank = None
        if entry.report is not None and entry.autoattack is not None and entry.audit != "failed":
            better = counts[entry.group]
            rank = 1 + sum(other > entry.autoattack for other in better)  # equals share a rank
            better.append(entry.autoattack)
        ranked.append(replace(entry, rank=rank))
    return tuple(ranked)


def _threat(entry: Entry) -> str:
    threat = entry.report.threat_model if entry.report is not None else None
    return "" if threat is None else f"{NORMS[threat.norm]} {threat.radius}"


def _data(entry: Entry, entries: Iterable[Entry]) -> str:
    """The data set's name; with digits of the fingerprint where there are several of that name."""
    if entry.report is None:
        return ""
    name, fingerprint = entry.report.data.name, entry.report.data.fingerprint
    same = {each.report.data.fingerprint for each in entries if each.report and each.report.data.name == name}
    return name if len(same) == 1 else f"{name} ({fingerprint[:8]})"
