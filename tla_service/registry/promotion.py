"""Aliases that never get worse by accident: a version passes the gate or is refused, one promotion at a time."""

import contextlib
import functools
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from tla_service.config import TrackingConfig
from tla_service.environment import code_version
from tla_service.errors import ConfigError
from tla_service.registry.evidence import Package, check_files, examine_evaluation, examine_files, find_version
from tla_service.registry.gate import Evaluated, Finding, compare, judge
from tla_service.registry.gate_rules import GateRules
from tla_service.registry.lock import HeldLock, registry_lock
from tla_service.report.schema import ThreatModel
from tla_service.tracking.connection import client, experiment_id, one_line, retrying, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "tla-promotions"
_TAG_LENGTH = 5000  # MLflow's limit
Verdict = Literal["promoted", "refused", "unchanged", "rolled back"]


@dataclass(frozen=True)
class Decision:
    """What became of a promotion.

    Attributes:
        verdict: ``promoted``, ``refused``, ``unchanged`` (it carries the alias already) or ``rolled back``.
        model: Registered model.
        version: The version in question; after a rollback the one that carries the alias now.
        alias: The alias.
        replaced: Version that carried it before; ``None`` where there was none.
        findings: Each rule's outcome.
        sequence: Rises with every change of the alias; 0 where nothing changed.
    """

    verdict: Verdict
    model: str
    version: str
    alias: str
    replaced: str | None
    findings: Sequence[Finding] = ()
    sequence: int = 0


def previous_alias(alias: str) -> str:
    """The alias of the version that carried an alias before: ``previous`` for ``champion``."""
    return "previous" if alias == "champion" else f"{alias}-previous"


def promote(tracking: TrackingConfig, model: str, version: str, alias: str, rules: GateRules) -> Decision:
    """Give an alias to a version, if the gate lets it through; record the decision either way.

    Safe against other promotions of the same alias, wherever they run.

    Raises:
        UserError: There is no such version, or the server is away.
    """
    return _Promotion(tracking, model, alias, rules).promote(version)


def roll_back(tracking: TrackingConfig, model: str, alias: str) -> Decision:
    """Give an alias back to the version that carried it before.

    Raises:
        UserError: There is none, it was changed since, or the server is away.
    """
    return _Promotion(tracking, model, alias, GateRules()).roll_back()


class _Promotion:
    def __init__(self, tracking: TrackingConfig, model: str, alias: str, rules: GateRules) -> None:
        self.uri = tracking_uri(tracking)
        self.made: MlflowClient = client(self.uri)
        self.model, self.alias, self.rules = model, alias, rules
        self.files: dict[str, tuple[Finding, Package | None]] = {}
        self.evaluations: dict[str, tuple[Finding, Evaluated | None]] = {}

    def promote(self, version: str) -> Decision:
        find_version(self.made, self.model, version)
        while True:
            # Files and reports do not change, only the alias does: all that is slow happens without the lock.
            holder = self._holder()
            findings = self._judge(version, holder)
            if not all(finding.passed for finding in findings):
                return self._finish(Decision("refused", self.model, version, self.alias, holder, findings))
            if holder == version:
                return self._finish(Decision("unchanged", self.model, version, self.alias, holder, findings))
            with self._lock(functools.partial(self._is_holder, holder)) as lock:
                if lock is not None and self._holder() == holder:
                    decision = Decision("promoted", self.model, version, self.alias, holder, findings, lock.generation)
                    return self._apply(decision, holder, lock)
            # Somebody else was promoted meanwhile: that is whom to compare with.

    def roll_back(self) -> Decision:
        with self._lock() as lock:
            assert lock is not None
            holder = self._holder()
            target = None if holder is None else self._replaced_by(holder)
            if holder is None or target is None:
                reason = f"there is no version that carried {self.alias!r} before"
                raise ConfigError("rollback", f"{self.model}@{self.alias}", reason, "promote a version instead")
            check_files(self.uri, find_version(self.made, self.model, target))
            decision = Decision("rolled back", self.model, target, self.alias, holder, (), lock.generation)
            return self._apply(decision, self._replaced_by(target), lock)

    def _lock(self, wanted: Callable[[], bool] = lambda: True) -> contextlib.AbstractContextManager[HeldLock | None]:
        return registry_lock(self.made, f"{self.model}-{self.alias}", wanted=wanted)

    def _judge(self, version: str, holder: str | None) -> list[Finding]:
        intact, package = self._files(version, "version")
        if package is None:
            return [intact]
        threat = self.rules.threat_model or package.trained_for
        evaluated, candidate = self._evaluation(package, threat, "version")
        if candidate is None:
            return [intact, evaluated]
        findings = [intact, evaluated, *judge(candidate, self.rules)]
        if holder is None or holder == version or not self.rules.not_worse:
            return findings
        return [*findings, *self._compare(candidate, threat, holder)]

    def _compare(self, candidate: Evaluated, threat: ThreatModel, holder: str) -> list[Finding]:
        """Hold the candidate against the holder of the alias, both under one threat model."""
        intact, theirs = self._files(holder, self.alias)
        if theirs is None:
            return [intact]
        if self.rules.threat_model is None and theirs.trained_for.slug != threat.slug:
            # Nobody replaces a champion by training for less than it.
            explanation = (
                f"trained for {threat}, version {holder} ({self.alias}) for {theirs.trained_for}; name the threat "
                "model to compare them under: rules.norm and rules.epsilon"
            )
            alias = "" if self.alias == "champion" else f" --alias {self.alias}"
            remedy = (
                f"run jobs/promote_model.py --model {self.model} --version {candidate.version}{alias} "
                f"--rules.norm {theirs.trained_for.norm} --rules.epsilon {theirs.trained_for.radius}"
            )
            return [Finding("comparable", passed=False, explanation=explanation, remedy=remedy)]
        evaluated, champion = self._evaluation(theirs, threat, self.alias)
        return [evaluated] if champion is None else compare(candidate, champion, self.alias, self.rules)

    def _files(self, version: str, subject: str) -> tuple[Finding, Package | None]:
        if version not in self.files:
            self.files[version] = examine_files(self.made, self.uri, self.model, version, subject=subject)
        return self.files[version]

    def _evaluation(self, package: Package, threat: ThreatModel, subject: str) -> tuple[Finding, Evaluated | None]:
        version = str(package.version.version)
        if version not in self.evaluations:
            self.evaluations[version] = examine_evaluation(self.made, package, threat, subject=subject)
        return self.evaluations[version]

    def _holder(self) -> str | None:
        found = retrying("Reading the alias", lambda: self.made.get_registered_model(self.model)).aliases
        return None if self.alias not in found else str(found[self.alias])

    def _is_holder(self, version: str | None) -> bool:
        return self._holder() == version

    def _replaced_by(self, version: str) -> str | None:
        """The version that another one took the alias from."""
        tags = retrying("Reading the version", lambda: self.made.get_model_version(self.model, version)).tags
        return tags.get(f"tla.{self.alias}.replaced") or None

    def _apply(self, decision: Decision, previous: str | None, lock: HeldLock) -> Decision:
        """Change the aliases. Whatever is interrupted on the way leaves a record that says RUNNING."""
        from mlflow.exceptions import MlflowException

        model, alias, version = self.model, self.alias, decision.version
        run_id = self._record(decision)
        try:
            if decision.verdict == "promoted":
                lock.check()
                self._tag(version, "replaced", decision.replaced or "")
            lock.check()
            retrying("Setting the alias", lambda: self.made.set_registered_model_alias(model, alias, version))
            lock.check()
            before = previous_alias(alias)
            if previous is not None:
                retrying("Setting the alias", lambda: self.made.set_registered_model_alias(model, before, previous))
            else:
                with contextlib.suppress(MlflowException):  # there is none
                    self.made.delete_registered_model_alias(model, before)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ConfigError("alias", alias, f"MLflow refuses it ({one_line(error)})", "choose another") from error
        self._tag_decision(decision, run_id)
        retrying("Closing the record", lambda: self.made.set_terminated(run_id, "FINISHED"))
        return decision

    def _finish(self, decision: Decision) -> Decision:
        """Record a decision that changes nothing."""
        run_id = self._record(decision)
        self._tag_decision(decision, run_id)
        retrying("Closing the record", lambda: self.made.set_terminated(run_id, "FINISHED"))
        return decision

    def _record(self, decision: Decision) -> str:
        """A run of its own for each decision: versions keep their last one only."""
        key = uuid.uuid4().hex
        tags = {
            "tla.promotion": decision.verdict,
            "tla.promotion.id": key,
            "tla.promotion.model": decision.model,
            "tla.promotion.version": decision.version,
            "tla.promotion.alias": decision.alias,
            "tla.promotion.replaced": decision.replaced or "",
            "tla.promotion.sequence": str(decision.sequence),
            "tla.promotion.rules": self.rules.model_dump_json(),
            "tla.promotion.findings": _findings(decision),
            **code_version(),
        }
        name = f"{decision.model}/{decision.version} {decision.verdict}"

        def create() -> str:
            experiment = experiment_id(self.made, EXPERIMENT, self.uri)
            # An attempt whose answer was lost may have made it.
            made = self.made.search_runs([experiment], f"tags.`tla.promotion.id` = '{key}'", max_results=1)
            run = made[0] if made else self.made.create_run(experiment, run_name=name, tags=tags)
            return str(run.info.run_id)

        return retrying("Recording the decision", create)

    def _tag_decision(self, decision: Decision, run_id: str) -> None:
        facts = {"decision": decision.verdict, "by": os.environ.get("MLFLOW_TRACKING_USERNAME") or "", "run": run_id}
        facts |= {"at": datetime.now(UTC).isoformat(timespec="seconds"), "findings": _findings(decision)}
        for name, value in facts.items():
            self._tag(decision.version, name, value)

    def _tag(self, version: str, name: str, value: str) -> None:
        key = f"tla.{self.alias}.{name}"
        retrying("Tagging the version", lambda: self.made.set_model_version_tag(self.model, version, key, value))


def _findings(decision: Decision) -> str:
    """All findings as JSON, or as many as fit into a tag."""
    names = ("rule", "passed", "explanation")
    found = [{name: getattr(finding, name) for name in names} for finding in decision.findings]
    while len(text := json.dumps(found)) > _TAG_LENGTH:
        found.pop()
    return text
