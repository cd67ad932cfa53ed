"""Measure how robust a model is, and write the report that says so.

python jobs/evaluate_tla.py --model models:/tla-digits@champion
python jobs/evaluate_tla.py --model runs:/RUN_ID/model --surrogate models:/tla-digits/2 --compare models:/tla-digits/3
"""

import sys

from tla_service.config.loading import read_settings
from tla_service.job import run_job
from tla_service.report.settings import EvaluateSettings, spread_lists


def main() -> int:
    """Read the settings, evaluate, and say where the report is."""
    settings = read_settings(EvaluateSettings, spread_lists(sys.argv[1:]))
    # Imported late: --help and wrong settings should not wait for torch, ray and mlflow.
    from tla_service.workflows.evaluate import evaluate_and_log

    return evaluate_and_log(settings)


if __name__ == "__main__":
    sys.exit(run_job(main))
