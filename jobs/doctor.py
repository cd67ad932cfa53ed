"""Check the health of this machine or cluster, with a remedy for each failure.

python jobs/doctor.py
ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/doctor.py --scaling.storage s3://bucket/runs
"""

import sys

from tla_service.cluster.doctor.settings import CheckupSettings
from tla_service.config.loading import read_settings
from tla_service.errors import UnavailableError
from tla_service.job import run_job


def main() -> int:
    """Run the checks, print the table, and exit with 3 if one failed."""
    settings = read_settings(CheckupSettings)
    # Imported late, so that --help and invalid settings do not wait for torch, ray and mlflow.
    from tla_service.cluster.doctor.examine import examine, table, verdict

    findings = list(examine(settings))
    print(table(findings))
    print(verdict(findings))
    return UnavailableError.exit_code if any(finding.state == "FAIL" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(run_job(main))
