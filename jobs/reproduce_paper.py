"""Reproduce a table of the paper: train and evaluate its methods, and write a page with intervals.

python jobs/reproduce_paper.py --table mnist --budget 120 --data.root /data/mnist
python jobs/reproduce_paper.py --table cifar10 --data.root /data/cifar10 --minutes 8
ray job submit --working-dir . -- python jobs/reproduce_paper.py --table cifar10 --data.root s3://bucket/cifar10
"""

import importlib.util
import sys

from tla_service.config.loading import read_settings
from tla_service.job import run_job
from tla_service.report.settings import spread_lists
from tla_service.results.settings import ReproduceSettings


def main() -> int:
    """Read the settings, make the table, and print where the page is."""
    settings = read_settings(ReproduceSettings, spread_lists(sys.argv[1:], ("methods",)))
    # Imported late: --help and invalid settings should not wait for torch, and a single machine needs no Ray or MLflow.
    track = None
    if settings.log and importlib.util.find_spec("mlflow") is not None:
        from tla_service.workflows.table_log import tracker

        track = tracker(settings)
    if settings.on_cluster:
        from tla_service.workflows.table import reproduce_on_ray

        return reproduce_on_ray(settings, track)
    from tla_service.results.local import reproduce_here

    return reproduce_here(settings, track)


if __name__ == "__main__":
    sys.exit(run_job(main))
