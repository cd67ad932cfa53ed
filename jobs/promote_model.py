"""Give a registered version an alias, if it passes the gate; or take the last promotion back.

python jobs/promote_model.py --model tla-digits --version 3 --alias champion
python jobs/promote_model.py --model tla-digits --version 3 --rules.min_autoattack_accuracy 0.7
python jobs/promote_model.py --model tla-digits --version 3 --rules.norm l2 --rules.epsilon 128/255
python jobs/promote_model.py --model tla-digits --rollback
"""

import shlex
import sys

from tla_service.config import TrackingConfig
from tla_service.config.loading import read_settings
from tla_service.job import next_command, run_job
from tla_service.registry.job_settings import PromoteSettings

REFUSED = 4


def main() -> int:
    """Read the settings, decide, and say why."""
    settings = read_settings(PromoteSettings)
    # Imported late: --help and wrong settings should not wait for mlflow.
    from tla_service.registry.promotion import previous_alias, promote, roll_back

    tracking, model, alias = settings.tracking, settings.model, settings.alias
    if settings.rollback:
        decision = roll_back(tracking, model, alias)
    else:
        decision = promote(tracking, model, settings.version, alias, settings.rules)
    for finding in decision.findings:
        print(finding)
    if decision.verdict == "refused":
        print(f"refused: {alias} stays with {f'version {decision.replaced}' if decision.replaced else 'nobody'}")
        remedy = next((finding.remedy for finding in decision.findings if not finding.passed and finding.remedy), "")
        if remedy:
            print(_next(remedy, tracking))
        return REFUSED
    was = f"; before: version {decision.replaced}" if decision.replaced else ""
    print(f"{decision.verdict}: models:/{model}@{alias} is version {decision.version}{was}")
    if decision.verdict == "promoted" and decision.replaced:
        print(f"version {decision.replaced} is models:/{model}@{previous_alias(alias)}; --rollback brings it back")
    store = _store(tracking)
    there = f'mlflow.set_tracking_uri("{store}"); ' if store else ""
    print(f'next: {there}mlflow.pyfunc.load_model("models:/{model}@{alias}")')
    return 0


def _next(remedy: str, tracking: TrackingConfig) -> str:
    """The line that says what to do about a refusal: a command where the remedy is one."""
    if not remedy.startswith("run jobs/"):
        return f"next: {remedy}"
    store = _store(tracking)
    return next_command(*shlex.split(remedy.removeprefix("run jobs/")), *(["--tracking.uri", store] if store else []))


def _store(tracking: TrackingConfig) -> str:
    """The tracking store, where this command was given one; without names and passwords, which no log must show."""
    return tracking.uri if tracking.uri and "@" not in tracking.uri else ""


if __name__ == "__main__":
    sys.exit(run_job(main))
