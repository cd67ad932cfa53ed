"""Write a page that ranks the evaluated versions of registered models; it needs no server and fetches nothing.

python jobs/leaderboard.py --tracking.uri http://mlflow:5000 --output leaderboard.html
python jobs/leaderboard.py --models tla-cifar10 tla-cifar10-l2
"""

import sys

from tla_service.config.loading import read_settings
from tla_service.job import run_job
from tla_service.registry.job_settings import LeaderboardSettings
from tla_service.report.settings import spread_lists


def main() -> int:
    """Read the settings, write the page, and say where it is."""
    settings = read_settings(LeaderboardSettings, spread_lists(sys.argv[1:], ("models",)))
    # Imported late, so that --help and invalid settings do not wait for mlflow.
    from tla_service.registry.leaderboard import read_leaderboard, write_leaderboard

    found = read_leaderboard(settings.tracking, settings.models)
    path = write_leaderboard(found, settings.output)
    evaluations = sum(entry.report is not None for entry in found.entries)
    print(f"{found.versions} versions of {len(found.models)} models, {evaluations} evaluations")
    if found.foreign:
        print(f"left out: {found.foreign} versions that this project did not register")
    print(f"leaderboard  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
