"""Register weights that were trained elsewhere: the state dict of a supported architecture.

python jobs/import_model.py --file wrn.safetensors --model.name wrn_28_10 --data.name cifar10 --data.root /data/cifar10
"""

import sys

from tla_service.config.loading import read_settings
from tla_service.job import next_command, run_job
from tla_service.registry.job_settings import ImportSettings


def main() -> int:
    """Read the settings, import, and print the next command."""
    settings = read_settings(ImportSettings)
    # Imported late, so that --help and invalid settings do not wait for torch and mlflow.
    from tla_service.registry.importing import import_model

    model_uri, clean_accuracy, notes = import_model(settings)
    for note in notes:
        print(f"{settings.file}: {note}")
    print(f"{model_uri}: clean accuracy {clean_accuracy:.2%} on the test set")
    where = ["--tracking.uri", settings.tracking.uri] if settings.tracking.uri else []
    print(next_command("evaluate_tla.py", "--model", model_uri, *where))
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
