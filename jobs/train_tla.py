"""Train a robust classifier with Ray Train and register it in MLflow.

python jobs/train_tla.py --preset digits
python jobs/train_tla.py --preset mnist --data.root /data/mnist --scaling.num_workers 4
"""

import sys

from tla_service.config.loading import find_output, load_settings, print_config
from tla_service.job import run_job


def main() -> int:
    """Read the configuration, train, and print the results."""
    settings = load_settings()
    if settings.print_config:
        print(print_config(settings))
        return 0
    # Imported late: --help and a wrong configuration should not wait for torch, ray and mlflow.
    from tla_service.workflows.train import train_and_register

    config, output = find_output(settings)
    return train_and_register(config, output, debug=settings.debug, json_logs=settings.log_format == "json")


if __name__ == "__main__":
    sys.exit(run_job(main))
