"""Give a registered version an alias if it passes the gate, or undo the last promotion.

python jobs/promote_model.py --model tla-digits --version 3 --alias champion
python jobs/promote_model.py --model tla-digits --version 3 --rules.min_autoattack_accuracy 0.7
python jobs/promote_model.py --model tla-digits --version 3 --rules.norm l2 --rules.epsilon 128/255
python jobs/promote_model.py --model tla-digits --rollback
"""

import shlex
import sys

from tla_service.config.loading import read_settings
from tla_service.errors import without_credentials
from tla_service.job import next_command, run_job
from tla_service.registry.job_settings import PromoteSettings

REFUSED = 4


def main() -> int:
    """Read the settings, decide, and print why."""
    settings = read_settings(PromoteSettings)
    # Imported late, so that --help and invalid settings do not wait for mlflow.
    from tla_service.registry.promotion import Promotion, previous_alias

    model, alias, store = settings.model, settings.alias, without_credentials(settings.tracking.uri or "")
    promotion = Promotion(settings.tracking, model, alias, settings.rules)
    decision = promotion.roll_back() if settings.rollback else promotion.promote(settings.version)
    for finding in decision.findings:
        print(finding)
    if decision.verdict == "refused":
        print(f"refused: {alias} stays with {f'version {decision.replaced}' if decision.replaced else 'nobody'}")
        remedy = next((finding.remedy for finding in decision.findings if not finding.passed and finding.remedy), "")
        if remedy.startswith("run jobs/"):
            where = ["--tracking.uri", store] if store else []
            print(next_command(*shlex.split(remedy.removeprefix("run jobs/")), *where))
        elif remedy:
            print(f"next: {remedy}")
        return REFUSED
    was = f"; before: version {decision.replaced}" if decision.replaced not in (None, decision.version) else ""
    print(f"{decision.verdict}: models:/{model}@{alias} is version {decision.version}{was}")
    if decision.verdict == "promoted" and decision.replaced:
        print(f"version {decision.replaced} is models:/{model}@{previous_alias(alias)}; --rollback restores it")
    there = f'mlflow.set_tracking_uri("{store}"); ' if store else ""
    print(f'next: {there}mlflow.pyfunc.load_model("models:/{model}@{alias}")')
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
