"""Promotion: gives an alias to a version that passes the gate, one promotion at a time."""

import contextlib
import functools
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from mlflow.exceptions import MlflowException

from tla_service.config import TrackingConfig
from tla_service.errors import ConfigError, UnavailableError, one_line, readable
from tla_service.job import code_version
from tla_service.registry.evidence import examine_evaluation, examine_files, find_version, verify
from tla_service.registry.gate import Evaluated, Finding, compare, judge
from tla_service.registry.job_settings import GateRules
from tla_service.registry.lock import RegistryLock, registry_lock
from tla_service.report.schema import ThreatModel
from tla_service.tracking.connection import client, existing_store, experiment_id, retrying
from tla_service.tracking.runs import tagged_run

EXPERIMENT = "tla-promotions"
_TAG_LENGTH = 5000  # MLflow's limit


@dataclass(frozen=True)
class Decision:
    """The outcome of a promotion; ``unchanged`` if the version carries the alias already.

    `version` is the one in question, and after a rollback the one that carries the alias now; `replaced` carried it
    before. `sequence` increases with every change of the alias; 0 if nothing changed.
    """

    verdict: Literal["promoted", "refused", "unchanged", "rolled back"]
    version: str
    replaced: str | None
    findings: Sequence[Finding] = ()
    sequence: int = 0


def previous_alias(alias: str) -> str:
    """The alias of the version that carried an alias before: ``previous`` for ``champion``."""
    return "previous" if alias == "champion" else f"{alias}-previous"


class Promotion:
    """Changes an alias of a registered model; safe against concurrent promotions on any machine."""

    def __init__(self, tracking: TrackingConfig, model: str, alias: str, rules: GateRules) -> None:
        self._uri = existing_store(tracking)
        self._made = client(self._uri)
        self._model, self._alias, self._rules = model, alias, rules
        self._lock = functools.partial(registry_lock, self._made, f"{model}-{alias}")
        # Files and reports are immutable, so each is examined once.
        self._files = functools.cache(functools.partial(examine_files, self._made, self._uri, model))
        self._evaluation = functools.cache(functools.partial(examine_evaluation, self._made))

    def promote(self, version: str) -> Decision:
        """Give the alias to a version if it passes the gate; records the decision either way."""
        while True:
            # Only the alias can change, so everything slow happens without the lock.
            holder = self._holder()
            findings = self._judge(version, holder)
            is_passed = all(finding.passed for finding in findings)
            if not is_passed or holder == version:
                decision = Decision("unchanged" if is_passed else "refused", version, holder, findings)
                with self._recorded(decision):
                    return decision
            with self._lock(wanted=functools.partial(self._is_holder, holder)) as lock:
                if lock is not None and self._is_holder(holder):
                    decision = Decision("promoted", version, holder, findings, lock.generation)
                    return self._apply(decision, holder, lock)
            # Another version was promoted meanwhile: compare with that one.

    def roll_back(self) -> Decision:
        """Give the alias back to the version that carried it before, if its files are unmodified."""
        while True:
            holder, target = found = self._last_change()
            if target is None:
                reason = f"no version carried {self._alias!r} before"
                raise ConfigError("rollback", f"{self._model}@{self._alias}", reason, "promote a version instead")
            verify(self._uri, find_version(self._made, self._model, target))
            with self._lock(wanted=functools.partial(self._is_last_change, found)) as lock:
                if lock is not None and self._is_last_change(found):
                    decision = Decision("rolled back", target, holder, (), lock.generation)
                    return self._apply(decision, self._replaced_by(target), lock)

    def _judge(self, version: str, holder: str | None) -> list[Finding]:
        intact, package = self._files(version, "version")
        if package is None:
            return [intact]
        threat = self._rules.threat_model or package.trained_for
        evaluated, candidate = self._evaluation(package, threat, "version")
        if candidate is None:
            return [intact, evaluated]
        findings = [intact, evaluated, *judge(candidate, self._rules)]
        if holder is None or holder == version or not self._rules.not_worse:
            return findings
        return [*findings, *self._compare(candidate, threat, holder)]

    def _compare(self, candidate: Evaluated, threat: ThreatModel, holder: str) -> list[Finding]:
        uncompared = "to replace it without a comparison: --no-rules.not_worse"
        try:
            intact, theirs = self._files(holder, self._alias)
        except UnavailableError as error:  # those of the candidate could be read
            raise UnavailableError(error.subject, error.value, error.reason, f"{error.remedy}; {uncompared}") from error
        if theirs is None:
            return [replace(intact, remedy=uncompared)]
        other = theirs.trained_for
        if self._rules.threat_model is None and other.slug != threat.slug:
            # A version must not replace the champion by being trained for a weaker threat model.
            explanation = f"trained for {threat}, but version {holder} ({self._alias}) for {other}; "
            explanation += "name the threat model to compare them under: rules.norm and rules.epsilon"
            remedy = f"give the same command with --rules.norm {other.norm} --rules.epsilon {other.radius}"
            return [Finding("comparable", False, explanation, remedy)]
        evaluated, champion = self._evaluation(theirs, threat, self._alias)
        if champion is not None:
            return compare(candidate, champion, self._alias, self._rules)
        can_be = evaluated.remedy.startswith("run jobs/")
        return [evaluated if can_be else replace(evaluated, remedy=uncompared)]

    def _holder(self) -> str | None:
        with readable("model", self._model, "name a registered model"):
            found = retrying("Reading the alias", lambda: self._made.get_registered_model(self._model)).aliases
        return str(found[self._alias]) if self._alias in found else None

    def _is_holder(self, version: str | None) -> bool:
        return self._holder() == version

    def _last_change(self) -> tuple[str | None, str | None]:
        """The holder, and the version that it took the alias from."""
        holder = self._holder()
        return holder, None if holder is None else self._replaced_by(holder)

    def _is_last_change(self, found: tuple[str | None, str | None]) -> bool:
        return self._last_change() == found

    def _replaced_by(self, version: str) -> str | None:
        """The version that another one took the alias from."""
        found = retrying("Reading the version", lambda: self._made.get_model_version(self._model, version))
        created = str(found.creation_timestamp)
        # MLflow copies a version with all its tags, to which its original's promotion means nothing.
        is_copy = found.tags.get(f"tla.{self._alias}.version_created", created) != created
        return None if is_copy else found.tags.get(f"tla.{self._alias}.replaced") or None

    def _apply(self, decision: Decision, previous: str | None, lock: RegistryLock) -> Decision:
        """Change the aliases. A killed process leaves a record with status RUNNING."""
        before = previous_alias(self._alias)
        with self._recorded(decision):
            try:
                if decision.verdict == "promoted":
                    created = find_version(self._made, self._model, decision.version).creation_timestamp
                    lock.check()
                    self._tag(decision.version, "replaced", decision.replaced or "")
                    self._tag(decision.version, "version_created", str(created))
                lock.check()
                # First, so that the same command completes what was interrupted.
                try:
                    if previous is not None:
                        self._set_alias(before, previous)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    previous = None  # a version that was deleted since it carried the alias
                if previous is None:
                    delete = functools.partial(self._made.delete_registered_model_alias, self._model, before)
                    retrying("Deleting the alias", delete)  # no error if it does not exist
                lock.check()
                self._set_alias(self._alias, decision.version)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                reason = f"MLflow refuses it ({one_line(error)})"
                raise ConfigError("alias", self._alias, reason, "choose another") from error
        return decision

    def _set_alias(self, alias: str, version: str) -> None:
        retrying("Setting the alias", lambda: self._made.set_registered_model_alias(self._model, alias, version))

    @contextlib.contextmanager
    def _recorded(self, decision: Decision) -> Iterator[None]:
        """Record a decision in a run of its own, as a version's tags keep the last one only."""
        found = [
            {"rule": each.rule, "passed": each.passed, "explanation": each.explanation} for each in decision.findings
        ]
        while len(findings := json.dumps(found)) > _TAG_LENGTH:
            found.pop()  # as many as fit into a tag
        facts = {
            "id": uuid.uuid4().hex,
            "model": self._model,
            "version": decision.version,
            "alias": self._alias,
            "replaced": decision.replaced or "",
            "sequence": str(decision.sequence),
            "rules": self._rules.model_dump_json(),
            "findings": findings,
        }
        tags = {"tla.promotion": decision.verdict, **{f"tla.promotion.{name}": fact for name, fact in facts.items()}}
        tags |= code_version()
        name = f"{self._model}/{decision.version} {decision.verdict}"

        def create() -> str:
            experiment = experiment_id(self._made, EXPERIMENT, self._uri)
            return str(tagged_run(self._made, experiment, "tla.promotion.id", name, tags).info.run_id)

        run_id = retrying("Recording the decision", create)
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):  # the first error says more
                retrying("Closing the record", lambda: self._made.set_terminated(run_id, "FAILED"))
            raise
        facts = {"decision": decision.verdict, "by": os.environ.get("MLFLOW_TRACKING_USERNAME") or "", "run": run_id}
        facts |= {"at": datetime.now(UTC).isoformat(timespec="seconds"), "findings": findings}
        for fact, value in facts.items():
            self._tag(decision.version, fact, value)
        retrying("Closing the record", lambda: self._made.set_terminated(run_id, "FINISHED"))

    def _tag(self, version: str, name: str, value: str) -> None:
        key = f"tla.{self._alias}.{name}"
        retrying("Tagging the version", lambda: self._made.set_model_version_tag(self._model, version, key, value))
