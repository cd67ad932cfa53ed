"""Remake a table of the paper: train and measure its methods, and write a page with intervals.

python jobs/reproduce_paper.py --table mnist --budget 120 --data.root /data/mnist
python jobs/reproduce_paper.py --table cifar10 --data.root /data/cifar10 --minutes 8
ray job submit --working-dir . -- python jobs/reproduce_paper.py --table cifar10 --data.root s3://bucket/cifar10
"""

import sys

from tla_service.config.loading import read_settings
from tla_service.job import run_job
from tla_service.report.settings import spread_lists
from tla_service.results.settings import ReproduceSettings


def main() -> int:
    """Read the settings, run, and say where the page is."""
    settings = read_settings(ReproduceSettings, spread_lists(sys.argv[1:], ("methods",)))
    # Imported late: --help and wrong settings should not wait for torch, and a lone machine needs no ray.
    if settings.on_cluster:
        from tla_service.cluster.table import reproduce_on_ray

        return reproduce_on_ray(settings)
    from tla_service.results.reproduce import reproduce_here

    return reproduce_here(settings)


if __name__ == "__main__":
    sys.exit(run_job(main))
