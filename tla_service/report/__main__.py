"""Evaluate checkpoint folders on this machine, without Ray or MLflow.

    python -m tla_service.report --model runs/NAME/checkpoints/STEP

Takes the settings of `jobs/evaluate_tla.py` except those of the cluster and of the tracking server.
"""

import sys

from tla_service.config.loading import read_settings
from tla_service.job import run_job
from tla_service.report.settings import ReportSettings, spread_lists


def main() -> int:
    """Read the settings, evaluate, and say where the report is."""
    settings = read_settings(ReportSettings, spread_lists(sys.argv[1:]))
    # Imported late: --help and wrong settings should not wait for torch.
    from tla_service.report.evaluate import evaluate
    from tla_service.report.loading import load_models
    from tla_service.report.page import show
    from tla_service.report.subjects import load_checkpoint_subject
    from tla_service.report.tasks import MeasureHere
    from tla_service.runtime import keep_freed_memory
    from tla_service.training.reporting import Terminal

    keep_freed_memory()
    terminal = Terminal()
    models = load_models(settings, load_checkpoint_subject)
    report, output = evaluate(settings, models, MeasureHere, terminal)
    show(report, output, terminal)
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
