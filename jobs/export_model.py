"""Export a registered model as torch.export's pt2 and as ONNX, and compare their outputs.

python jobs/export_model.py --model models:/tla-digits@champion --output export
"""

import sys

from tla_service.config.loading import read_settings
from tla_service.job import run_job
from tla_service.registry.job_settings import ExportSettings


def main() -> int:
    """Read the settings, export, and print the accuracy of each file."""
    settings = read_settings(ExportSettings)
    # Imported late, so that --help and invalid settings do not wait for torch and mlflow.
    from tla_service.registry.exporting import export_model
    from tla_service.tracking.connection import tracking_uri

    uri = tracking_uri(settings.tracking)
    for path, difference in export_model(settings.model, settings.output, settings.formats, uri).items():
        print(f"{path}: matches the network to within {difference:.1e} of its largest output")
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
