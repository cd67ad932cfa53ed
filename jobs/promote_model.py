"""Give a registered version an alias, if it passes the gate; or take the last promotion back.

python jobs/promote_model.py --model tla-digits --version 3 --alias champion
python jobs/promote_model.py --model tla-digits --version 3 --rules.min_autoattack_accuracy 0.7
python jobs/promote_model.py --model tla-digits --rollback
"""

import sys

from tla_service.config_loading import read_settings
from tla_service.job import run_job
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
        return REFUSED
    was = f"; before: version {decision.replaced}" if decision.replaced else ""
    print(f"{decision.verdict}: models:/{model}@{alias} is version {decision.version}{was}")
    if decision.verdict == "promoted" and decision.replaced:
        print(f"version {decision.replaced} is models:/{model}@{previous_alias(alias)}; --rollback brings it back")
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
